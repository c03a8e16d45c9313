"""Generations that are forgotten: their rows go, and what they come to stays exact."""

import contextlib
import datetime
import itertools
import logging
import threading
import time
from collections.abc import Iterator

from sqlalchemy import Engine, delete, func, insert, select
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import BooksError
from pipeline.serve.books import tables
from pipeline.serve.books.database import one_state, open_books, shown, why
from pipeline.serve.books.pending import bring_in, pending_folder, read_waiting
from pipeline.serve.books.sums import DAY_MS, EPOCH, sums_of_generations

log = logging.getLogger(__name__)

EVERY_S = 60 * 60
LATER = "try again in a moment"
_AT_ONCE = 5000
_PAUSE_S = 0.1
"""Between two batches, in which whoever waits to write has its turn."""


def forget(books: Engine, before: datetime.date) -> int:
    """Make sums by day, key, model and provider of all rows of earlier days; how many they were.

    BooksError while the books cannot be written: what was done until then is done.
    """
    return sum(_batches(books, before))


@contextlib.contextmanager
def forgetting(where: str | None, num_days: int | None) -> Iterator[None]:
    """Meanwhile what is older than so many days is, every hour; None keeps everything.

    `where` is what `open_books` takes.
    """
    if num_days is None:
        yield
        return
    ended = threading.Event()
    forgetter = threading.Thread(target=_forget_old, args=(where, num_days, ended), name="forget")
    forgetter.start()
    try:
        yield
    finally:
        ended.set()
        forgetter.join()


def _forget_old(where: str | None, num_days: int, ended: threading.Event) -> None:
    while not ended.is_set():
        before = _today() - datetime.timedelta(days=num_days)
        try:
            with open_books(where) as books:
                # Whoever ends this waits for no more than a batch.
                batches = itertools.takewhile(lambda _: not ended.is_set(), _batches(books, before))
                log.info("%d generations before %s are forgotten", sum(batches), before)
        except BooksError as error:
            log.warning("what is older than %d days is not forgotten: %s", num_days, error)
        ended.wait(EVERY_S)


def _batches(books: Engine, before: datetime.date) -> Iterator[int]:
    """Does it bit by bit: how many rows each was."""
    if before > (latest := _today() - datetime.timedelta(days=1)):
        # Limits count these by row, as some of theirs may still be on their way.
        what = f"generations of {latest} and later are still needed"
        raise BooksError(f"{what}, by UTC; what is before {latest} can be forgotten")
    before_ms, num_forgotten = (before - EPOCH).days * DAY_MS, 0
    folder = pending_folder(books.url)
    try:
        # A row that is booked and lies in a file, too, would be counted again later.
        bring_in(books, folder)
        if num_waiting := len(read_waiting(folder)):
            raise BooksError(
                f"{num_waiting} replies of a running server wait to be booked; {LATER}"
            )
        while (last_ms := _end_of_batch(books, before_ms)) is not None:
            num = _forget_batch(books, last_ms)
            num_forgotten += num
            yield num
            time.sleep(_PAUSE_S)
    except SQLAlchemyError as error:
        done = f"{num_forgotten} generations are forgotten"
        what = f"{shown(books.url)} could not be written: {why(error)}; {done}, {LATER}"
        raise BooksError(what) from error


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


def _end_of_batch(books: Engine, before_ms: int) -> int | None:
    """The time of the last row that the oldest ones are forgotten with; None if there is no row."""
    time_ms = tables.generations.c.created_ms
    oldest = select(time_ms).where(time_ms < before_ms).order_by(time_ms).limit(_AT_ONCE).subquery()
    with books.connect() as connection:
        last_ms: int | None = connection.scalar(select(func.max(oldest.c.created_ms)))
    return last_ms


def _forget_batch(books: Engine, last_ms: int) -> int:
    """In one transaction, whose statements see the same rows; sums in the order of their table."""
    row, sums = tables.generations.c, tables.daily_sums
    groups = [(row.created_ms // DAY_MS).label("day"), row.key_id, row.model, row.provider]
    counted = [*groups, *sums_of_generations(), func.max(row.created_ms).label("last_ms")]
    summed = select(*counted).where(row.created_ms <= last_ms).group_by(*groups)
    with one_state(books) as connection:
        connection.execute(insert(sums).from_select(list(sums.c), summed))
        gone = connection.execute(delete(tables.generations).where(row.created_ms <= last_ms))
        connection.commit()
    return gone.rowcount
