"""The ledger: one row for each generation, committed before its reply ends."""

import asyncio
import datetime
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from sqlalchemy import BigInteger, Engine, cast, func, insert, select
from sqlalchemy.exc import IntegrityError

from pipeline.errors import BooksError
from pipeline.serve import tables
from pipeline.serve.spending import Spent, read_spent, spent_columns

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


@dataclass(frozen=True)
class _Entry:
    """A row on its way, and who waits for it."""

    generation: Generation
    written: "Future[None]"


class Ledger:
    """The generations in the books; a thread of its own writes what has gathered as one commit."""

    def __init__(self, books: Engine):
        self._books = books
        self._entries: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="ledger", daemon=True)
        self._writer.start()
        self._is_closed = False

    async def record(self, generation: Generation) -> None:
        """Return once the row is on the disk; BooksError if it cannot be written.

        It is written all the same when the caller is cancelled meanwhile.
        """
        if self._is_closed:
            raise BooksError(f"{generation.id} came after the ledger was closed")
        entry = _Entry(generation, Future())
        self._entries.put(entry)
        await asyncio.wrap_future(entry.written)

    async def find(self, generation_id: str) -> Generation | None:
        """The row of that id, whosever it is."""
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
        return await asyncio.to_thread(self._cost, key_id, begin_ms, end_ms)

    def close(self) -> None:
        """Write what is on its way and stop."""
        self._is_closed = True
        self._entries.put(None)
        self._writer.join()

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

    def _write_all(self) -> None:
        while True:
            gathered = [self._entries.get()]
            while not self._entries.empty():
                gathered.append(self._entries.get())
            entries = [entry for entry in gathered if entry]
            if entries:
                self._write(entries)
            if None in gathered:
                return

    def _write(self, entries: Sequence[_Entry]) -> None:
        """Commit all together; where one row is not fit to be written, each by itself."""
        try:
            with self._books.begin() as connection:
                rows = [vars(entry.generation) for entry in entries]
                connection.execute(insert(tables.generations), rows)
        except IntegrityError as error:
            if len(entries) == 1:
                _tell(entries, error)
            else:
                for entry in entries:
                    self._write([entry])
        except Exception as error:  # noqa: BLE001 - the thread lives on, and who waits is told
            _tell(entries, error)
        else:
            _tell(entries)


def _tell(entries: Sequence[_Entry], error: Exception | None = None) -> None:
    for entry in entries:
        if not entry.written.set_running_or_notify_cancel():
            continue  # nobody waits for it any more
        if error is None:
            entry.written.set_result(None)
        else:
            reason = getattr(error, "orig", None) or error  # SQLAlchemy's own text quotes the row
            failure = BooksError(f"{entry.generation.id} was not written to the books: {reason}")
            failure.__cause__ = error
            entry.written.set_exception(failure)
