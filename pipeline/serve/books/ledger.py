"""The ledger: one row for each generation, committed before its reply ends."""

import asyncio
import contextlib
import datetime
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from sqlalchemy import Connection, Engine, delete, false, select
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import BooksError
from pipeline.serve.books import tables
from pipeline.serve.books.database import OTHERS, one_state, shown, why
from pipeline.serve.books.journal import Journal
from pipeline.serve.books.measured import Measured, read_measured
from pipeline.serve.books.pending import (
    JOURNAL,
    SPOOL,
    bring_in,
    not_booked,
    pending_folder,
    read_waiting,
)
from pipeline.serve.books.spending import NEVER_MS, Spent, read_cost, read_spent
from pipeline.serve.books.spool import Row, Spool
from pipeline.serve.books.sums import By, Scope, Sums, date_of, read_sums
from pipeline.serve.books.writer import State, Writer

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one request asked for and got; never a word of it."""

    id: str
    key_id: int | None
    """None where the server asks for no key."""
    model: str
    """The slug that answered."""
    artefact_hash: str | None
    """sha256 of the weights that answered, where they lie here and it was written down."""
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
    price_version: str | None = None
    """Of the price that its cost was counted by: prompt, completion, cached and request, in
    pico-dollars; None if whoever answered has told it, and for an answer that was told again."""
    cache_source: str | None = None
    """The id of the earlier reply that this one repeats."""


@dataclass(frozen=True)
class DailyUse:
    """What one key has asked at one place in one day."""

    day: datetime.date
    """In UTC."""
    model: str
    provider: str
    sums: Sums


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
        by: tuple[By, ...] = ("day", "model", "provider")
        scope = Scope(first, last, (key_id,))
        found = await self._read(lambda books, waiting: read_sums(books, waiting, by, scope))
        days = [
            DailyUse(date_of(int(day or 0)), str(model), str(provider), sums)
            for (day, model, provider), sums in found.items()
        ]
        return sorted(days, key=lambda use: (-use.day.toordinal(), use.model, use.provider))

    async def spent(self, key_id: int | None, today: datetime.date) -> Spent:
        """By a key, to this moment."""
        scope = Scope(keys=(key_id,))
        found = await self._read(lambda books, waiting: read_spent(books, waiting, today, scope))
        return found.get(key_id, Spent())

    async def spent_by_key(self, today: datetime.date) -> dict[int | None, Spent]:
        """By every key that has asked for something; None is those who had none."""
        return await self._read(lambda books, waiting: read_spent(books, waiting, today, Scope()))

    async def cost(self, key_id: int, begin_ms: int, end_ms: int = NEVER_MS) -> int:
        """Of a key's replies that were asked for between these midnights, in pico-dollars."""
        return await self._read(
            lambda books, waiting: read_cost(books, waiting, key_id, begin_ms, end_ms)
        )

    async def measured(self, model: str, provider: str, now_ms: int) -> Measured:
        """How a model was answered by somebody lately; rows that wait to be booked do not count."""
        return await self._read(lambda books, _: read_measured(books, model, provider, now_ms))

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

    async def _read(self, work: Callable[[Connection, Sequence[Row]], T]) -> T:
        """What it finds in one state of the books, and in the rows that are not in them yet."""
        spool = self._writer.spool

        def read() -> T:
            # First: what is brought in meanwhile is in the books then.
            waiting = [*spool.rows, *read_waiting(spool.file.parent, but=spool.file)]
            with one_state(self._books) as connection:
                return work(connection, not_booked(connection, waiting))

        return await asyncio.to_thread(read)


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
