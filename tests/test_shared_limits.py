"""Limits of several processes over the same books: granted once between them, whatever they do."""

import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
from books import generation, hold
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, func, select

from pipeline.serve.books import tables
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Key, Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.books.shared_uses import SharedUses
from pipeline.serve.books.use_rows import LEASE_S
from pipeline.serve.books.uses import LimitReached, Most, Unaffordable
from pipeline.serve.books.window import WINDOW_S

NOON = datetime.datetime(2026, 3, 31, 12, tzinfo=datetime.UTC).timestamp()


class Clock:
    """Moved by hand; all processes have the same."""

    now_s = NOON

    def __call__(self) -> float:
        return self.now_s


class Process:
    """What one server has of its own: its connections, its ledger, and its count of uses."""

    def __init__(self, books: Engine, clock: Clock) -> None:
        self.books = books
        self.ledger = Ledger(books)
        self.clock = clock
        self.uses = SharedUses(books, self.ledger, clock)

    async def enter(self, use_id: str, key: Key) -> bool:
        try:
            await self.uses.begin(use_id, key)
        except LimitReached:
            return False
        return True

    async def hold(self, use_id: str, key: Key, tokens: int, cost: int) -> bool:
        """As a request does that has come and is about to be answered."""
        if not await self.enter(use_id, key):
            return False
        now_ms = int(self.clock() * 1000)
        most = Most(tokens, cost, now_ms, 0, int((NOON - 2 * 24 * 3600) * 1000))
        try:
            await self.uses.reserve(use_id, key, most)
        except (LimitReached, Unaffordable):
            await self.uses.end(use_id, key)
            return False
        return True

    async def book(self, use_id: str, key: Key, cost: int) -> None:
        changed = {"key_id": key.id, "created_ms": int(self.clock() * 1000)}
        await self.ledger.record(generation(id=use_id, cost_picodollars=cost, **changed))

    async def reply(self, use_id: str, key: Key, tokens: int, cost: int) -> bool:
        """The whole of a request, which uses all that it may."""
        if not await self.hold(use_id, key, tokens, cost):
            return False
        await asyncio.sleep(0.001)
        await self.book(use_id, key, cost)
        await self.uses.settle(use_id, key, tokens, cost)
        await self.uses.end(use_id, key)
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def processes(books_at: str, clock: Clock) -> Iterator[Sequence[Process]]:
    with contextlib.ExitStack() as stack:
        opened = [Process(stack.enter_context(open_books(books_at)), clock) for _ in range(3)]
        for process in opened:
            stack.enter_context(closing(process.ledger))
        yield opened


@contextlib.asynccontextmanager
async def living(processes: Sequence[Process]) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for process in processes:
            await stack.enter_async_context(process.uses.living())
        yield


def make_key(process: Process, **limits: Any) -> Key:
    keys = Keys(process.books)
    keys.create("mine", limits)
    return keys.all()[-1]


def num_uses(process: Process) -> int:
    with process.books.connect() as connection:
        return connection.scalar(select(func.count()).select_from(tables.uses)) or 0


@given(
    limit=st.integers(0, 40),
    costs=st.lists(st.integers(1, 9), min_size=1, max_size=15),
    tokens_a_minute=st.integers(1, 40),
)
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
def test_together_they_never_overshoot_a_limit(
    processes: Sequence[Process], limit: int, costs: list[int], tokens_a_minute: int
) -> None:
    key = make_key(processes[0], limit_picodollars=limit, tokens_per_minute=tokens_a_minute)

    async def ask_all() -> list[bool]:
        asking = [
            processes[number % 3].reply(f"gen-{key.id}-{number}", key, cost, cost)
            for number, cost in enumerate(costs)
        ]
        return await asyncio.gather(*asking)

    async def talk() -> list[bool]:
        for process in processes:
            await process.uses.sign()
        return await ask_all()

    granted = asyncio.run(talk())

    used = sum(cost for cost, is_granted in zip(costs, granted, strict=True) if is_granted)
    assert used <= limit
    assert used <= max(tokens_a_minute, max(costs))
    if not any(granted):
        assert min(costs) > limit, "what alone is affordable gets through"


def test_together_they_answer_so_many_at_the_same_time(processes: Sequence[Process]) -> None:
    key = make_key(processes[0], streams=2)

    async def talk() -> None:
        async with living(processes):
            first, second, third = processes
            entered = [await p.enter(f"gen-{n}", key) for n, p in enumerate(processes)]
            assert entered == [True, True, False]
            await second.uses.settle("gen-1", key, 0, 0)
            assert await third.enter("gen-3", key), "a reply that is told leaves its place"
            assert not await first.enter("gen-4", key)
            await third.uses.end("gen-3", key)
            assert await first.enter("gen-5", key)

    asyncio.run(talk())


def test_together_they_answer_so_many_in_any_minute(
    processes: Sequence[Process], clock: Clock
) -> None:
    key = make_key(processes[0], requests_per_minute=3)

    async def ask(process: Process, name: str) -> float:
        try:
            await process.uses.begin(name, key)
        except LimitReached as reached:
            return reached.wait_s
        await process.uses.end(name, key)
        return 0

    async def talk() -> None:
        async with living(processes):
            first, second, third = processes
            assert await ask(first, "a") == 0
            clock.now_s += 20
            assert [await ask(p, n) for p, n in ((second, "b"), (third, "c"))] == [0, 0]
            assert await ask(first, "d") == 40
            clock.now_s = NOON + WINDOW_S
            assert [await ask(second, "e"), await ask(second, "f")] == [0, 20]

    asyncio.run(talk())


def test_what_a_dead_process_held_is_free_after_its_lease(
    processes: Sequence[Process], clock: Clock
) -> None:
    limits = {"limit_picodollars": 10, "tokens_per_minute": 10, "streams": 1}
    key = make_key(processes[0], **limits)
    dead, alive = processes[:2]

    async def talk() -> None:
        await dead.uses.sign()
        await alive.uses.sign()
        assert await dead.hold("gen-1", key, 10, 10)
        assert not await alive.hold("gen-2", key, 1, 1)
        clock.now_s += LEASE_S - 1
        await alive.uses.sign()
        assert not await alive.hold("gen-3", key, 1, 1)
        clock.now_s += 2
        await alive.uses.sign()
        assert await alive.hold("gen-4", key, 10, 10)
        clock.now_s += 20 * LEASE_S
        await alive.uses.sign()
        assert num_uses(alive) == 1, "of a process that is forgotten nothing is kept"

    asyncio.run(talk())


def test_a_cost_that_the_books_do_not_have_yet_counts(processes: Sequence[Process]) -> None:
    key = make_key(processes[0], limit_picodollars=10)
    first, second = processes[:2]

    async def talk() -> None:
        async with living(processes):
            assert await first.hold("gen-1", key, 1, 10)
            await first.uses.settle("gen-1", key, 1, 7)  # its row waits in the first one's spool
            assert not await second.hold("gen-2", key, 1, 4)
            assert await second.hold("gen-3", key, 1, 3)
            await second.uses.settle("gen-3", key, 1, 0)
            await first.book("gen-1", key, 7)
            assert not await second.hold("gen-4", key, 1, 4), "in the books, and once"
            assert await second.hold("gen-5", key, 1, 3)

    asyncio.run(talk())


def test_what_the_books_could_not_be_told_is_told_later(
    processes: Sequence[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make_key(processes[0], limit_picodollars=10)
    first, second = processes[:2]

    async def talk() -> None:
        async with living(processes):
            assert await first.hold("gen-1", key, 1, 10)
            with second.books.connect() as connection, connection.begin():
                hold(connection)
                if connection.dialect.name == "postgresql":
                    connection.exec_driver_sql("LOCK TABLE uses IN SHARE MODE")
                await first.uses.settle("gen-1", key, 1, 2)
            assert not await second.hold("gen-2", key, 1, 8)
            await first.uses.sign()
            assert await second.hold("gen-3", key, 1, 8)

    asyncio.run(talk())


def test_only_what_still_counts_is_kept(processes: Sequence[Process], clock: Clock) -> None:
    key = make_key(processes[0], limit_picodollars=10**9, requests_per_minute=1000)
    first = processes[0]

    async def talk() -> None:
        async with living(processes[:1]):
            for number in range(3):
                assert await first.reply(f"gen-{number}", key, 1, 5)
            assert await first.hold("gen-4", key, 1, 5)
            await first.uses.settle("gen-4", key, 1, 5)
            assert num_uses(first) == 4
            clock.now_s += WINDOW_S + 1
            await first.uses.sign()
            assert num_uses(first) == 1, "the one that is not in the books"

    asyncio.run(talk())


def test_who_hangs_up_while_it_is_being_let_in_holds_nothing(processes: Sequence[Process]) -> None:
    key = make_key(processes[0], streams=1, limit_picodollars=10)
    first, second = processes[:2]

    async def hang_up_while_locked(asking: Awaitable[object]) -> None:
        with second.books.connect() as connection, connection.begin():
            hold(connection)
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("LOCK TABLE uses IN SHARE MODE")
            task = asyncio.ensure_future(asking)
            await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.sleep(0.1)
        with pytest.raises(asyncio.CancelledError):
            await task

    async def talk() -> None:
        async with living(processes):
            await hang_up_while_locked(first.uses.begin("gen-1", key))
            assert await second.hold("gen-2", key, 1, 10)
            await second.uses.end("gen-2", key)
            assert await first.enter("gen-3", key)
            most = Most(1, 10, int(NOON * 1000), 0, 0)
            await hang_up_while_locked(first.uses.reserve("gen-3", key, most))
            await first.uses.end("gen-3", key)
            assert await second.hold("gen-4", key, 1, 10)

    asyncio.run(talk())
