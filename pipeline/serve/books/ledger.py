"""The ledger: one row for each generation, committed before its reply ends."""

import asyncio
import contextlib
import datetime
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from sqlalchemy import BigInteger, Engine, cast, delete, false, func, select
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import BooksError
from pipeline.serve.books import tables
from pipeline.serve.books.database import OTHERS, shown, why
from pipeline.serve.books.journal import Journal
from pipeline.serve.books.pending import JOURNAL, SPOOL, bring_in, pending_folder
from pipeline.serve.books.spending import Spent, read_spent, spent_columns
from pipeline.serve.books.spool import Spool
from pipeline.serve.books.writer import State, Writer

log = logging.getLogger(__name__)

_EPOCH = datetime.date(1970, 1, 1)
_DAY_MS = 24 * 60 * 60 * 1000
_SUMMED = (
    "prompt_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "cached_tokens",
    "cost_picodollars",
)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one request asked for and got; never a word of it."""

    id: str
    key_id: int | None
    """None where the server asks for no key."""
    model: str
    """The slug that answered."""
    artefact_hash: str | None
    """sha256 of the weights that answered, where they lie here."""
    engine: str
    created_ms: int
    """Since the epoch."""
    streamed: bool
    prompt_tokens: int
    completion_tokens: int
    """Reasoning included."""
    reasoning_tokens: int
    cached_tokens: int
    """Of the prompt's."""
    finish_reason: str | None
    native_finish_reason: str | None
    latency_ms: int
    """From the request to the end of the reply."""
    first_token_ms: int | None
    """From the request to the first token; None if none came."""
    generation_ms: int | None
    """From the first token to the last."""
    cancelled: bool = False
    """The client hung up."""
    error_type: str | None = None
    ignored: tuple[str, ...] = ()
    """Parameters that were asked for and not honoured."""
    http_referer: str | None = None
    app_title: str | None = None
    external_user: str | None = None
    """The request's `user`."""
    session_id: str | None = None
    cost_picodollars: int = 0
    provider: str = "Pipeline"
    """Who answered: this server, or one that it asked in turn."""
    user_agent: str | None = None
    preset: str | None = None
    """The one that the request was sent under."""
    cache_source: str | None = None
    """The id of the earlier reply that this one repeats."""


@dataclass(frozen=True)
class DailyUse:
    """What one key has asked of one model in one day."""

    day: datetime.date
    """In UTC."""
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    cost_picodollars: int


class Ledger:
    """The generations in the books, and those that are on their way there."""

    def __init__(self, books: Engine, folder: Path | None = None) -> None:
        """`folder` is for what is not in the books yet; by default it lies beside them."""
        self._books = books
        self._is_closed = False
        folder = folder or pending_folder(books.url)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            spool = Spool(folder / f"{uuid4().hex}{SPOOL}")
        except OSError as error:
            what = f"{error.filename or folder}: {error.strerror}"
            raise BooksError(f"rows cannot be kept beside the books: {what}") from error
        self._writer = Writer(books, spool)
        self._journal = Journal(spool.file.with_suffix(JOURNAL))

    @property
    def state(self) -> State:
        """How far the books are behind."""
        return self._writer.state

    async def record(self, generation: Generation) -> None:
        """Return once the row is on the disk; BooksError if it cannot be written.

        It is written all the same when the caller is cancelled meanwhile. While the books are away
        it waits for them in a file.
        """
        if self._is_closed:
            raise BooksError(f"{generation.id} came after the ledger was closed")
        await asyncio.wrap_future(self._writer.put(vars(generation)))

    def follow(self, reply_id: str, so_far: Callable[[], Generation]) -> None:
        """A reply begins: from now on it is booked as far as it has come if we are killed."""
        self._journal.follow(reply_id, lambda: vars(so_far()))

    def unfollow(self, reply_id: str) -> None:
        """It has been recorded, or is not to be."""
        self._journal.unfollow(reply_id)

    async def find(self, generation_id: str) -> Generation | None:
        """The row of that id, whosever it is."""
        for row in self._writer.spool.rows:
            if row["id"] == generation_id:
                return Generation(**row)
        return await asyncio.to_thread(self._find, generation_id)

    async def daily_use(
        self, key_id: int | None, first: datetime.date, last: datetime.date
    ) -> list[DailyUse]:
        """Of a key on these days and those between, the latest first."""
        return await asyncio.to_thread(self._daily_use, key_id, first, last)

    async def spent(self, key_id: int | None, today: datetime.date) -> Spent:
        """By a key, to this moment."""
        return await asyncio.to_thread(self._spent, key_id, today)

    async def spent_by_key(self, today: datetime.date) -> dict[int | None, Spent]:
        """By every key that has asked for something; None is those who had none."""
        return await asyncio.to_thread(self._spent_by_key, today)

    async def cost(self, key_id: int, begin_ms: int, end_ms: int | None = None) -> int:
        """Of a key's replies that were asked for between these moments, in pico-dollars."""
        waiting = [  # first, as what is brought in meanwhile is then counted twice, not never
            int(row["cost_picodollars"])
            for row in self._writer.spool.rows
            if row["key_id"] == key_id
            and row["created_ms"] >= begin_ms
            and (end_ms is None or row["created_ms"] < end_ms)
        ]
        return sum(waiting) + await asyncio.to_thread(self._cost, key_id, begin_ms, end_ms)

    def close(self) -> None:
        """Write what is on its way and stop."""
        if self._is_closed:
            return
        self._is_closed = True
        self._writer.close()
        self._journal.close()
        self._writer.spool.close()

    def _find(self, generation_id: str) -> Generation | None:
        with self._books.connect() as connection:
            found = select(tables.generations).where(tables.generations.c.id == generation_id)
            row = connection.execute(found).mappings().first()
        return Generation(**{**row, "ignored": tuple(row["ignored"])}) if row else None

    def _daily_use(
        self, key_id: int | None, first: datetime.date, last: datetime.date
    ) -> list[DailyUse]:
        column = tables.generations.c
        number = (column.created_ms // _DAY_MS).label("number")
        sums = [cast(func.sum(column[name]), BigInteger).label(name) for name in _SUMMED]
        found = (
            select(number, column.model, func.count().label("requests"), *sums)
            .where(column.key_id.is_not_distinct_from(key_id))
            .where(number.between((first - _EPOCH).days, (last - _EPOCH).days))
            .group_by(number, column.model)
            .order_by(number.desc(), column.model)
        )
        with self._books.connect() as connection:
            rows = [dict(row) for row in connection.execute(found).mappings()]
        days = [_EPOCH + datetime.timedelta(days=row.pop("number")) for row in rows]
        return [DailyUse(day, **row) for day, row in zip(days, rows, strict=True)]

    def _spent(self, key_id: int | None, today: datetime.date) -> Spent:
        found = select(*spent_columns(today)).where(
            tables.generations.c.key_id.is_not_distinct_from(key_id)
        )
        with self._books.connect() as connection:
            return read_spent(connection.execute(found).one())

    def _cost(self, key_id: int, begin_ms: int, end_ms: int | None) -> int:
        column = tables.generations.c
        found = select(func.sum(column.cost_picodollars)).where(
            column.key_id == key_id, column.created_ms >= begin_ms
        )
        if end_ms is not None:
            found = found.where(column.created_ms < end_ms)
        with self._books.connect() as connection:
            return int(connection.scalar(found) or 0)

    def _spent_by_key(self, today: datetime.date) -> dict[int | None, Spent]:
        column = tables.generations.c.key_id
        found = select(column, *spent_columns(today)).group_by(column)
        with self._books.connect() as connection:
            return {row[0]: read_spent(row[1:]) for row in connection.execute(found)}


@contextlib.contextmanager
def open_ledger(books: Engine) -> Iterator[Ledger]:
    """The ledger of books that can be written, with all that an earlier process left behind.

    BooksError for books that cannot.
    """
    try:
        with books.begin() as connection:  # nothing, but only a writer may
            connection.execute(delete(tables.generations).where(false()))
        if num_rows := bring_in(books, pending_folder(books.url)):
            log.warning("%d replies are booked that a server left behind", num_rows)
    except SQLAlchemyError as error:
        what = f"{shown(books.url)} cannot be written: {why(error)}"
        raise BooksError(f"{what}; free it, or {OTHERS}") from error
    with contextlib.closing(Ledger(books)) as ledger:
        yield ledger
