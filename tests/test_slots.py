"""Nobody goes on from what somebody else has left in an engine's slot."""

import asyncio
import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.slots import Slots, num_shared

IDS = st.lists(st.integers(0, 1), max_size=9)
Step = tuple[str, tuple[int, ...]]


def take(slots: Slots, steps: Sequence[Step]) -> list[tuple[int, bool]]:
    """One after the other."""

    async def talk() -> list[tuple[int, bool]]:
        taken = []
        for owner, ids in steps:
            async with slots.taken(owner, ids) as found:
                taken.append(found)
        return taken

    return asyncio.run(talk())


def test_a_conversation_finds_its_own_slot_again() -> None:
    steps = [("a", (1, 2)), ("a", (5, 6)), ("b", (1, 2)), ("a", (1, 2, 3)), ("a", (5, 6, 7))]

    taken = take(Slots(3), steps)

    assert [may_go_on for _, may_go_on in taken] == [False, False, False, True, True]
    assert [number for number, _ in taken] == [0, 1, 2, 0, 1]


def test_without_a_slot_of_its_own_it_takes_the_one_that_was_longest_unused() -> None:
    steps = [("a", (1,)), ("b", (1,)), ("c", (1,)), ("b", (1,)), ("a", (1,))]

    assert take(Slots(2), steps) == [(0, False), (1, False), (0, False), (1, True), (0, False)]


@pytest.mark.parametrize(
    ("total", "num_parts", "numbers"), [(4, 2, [{0, 2}, {1, 3}]), (3, 2, [{0, 2}, {1}])]
)
def test_processes_that_share_an_engine_share_no_slot(
    total: int, num_parts: int, numbers: list[set[int]]
) -> None:
    steps = [("a", (n,)) for n in range(6)]
    parts = [Slots(total, part, num_parts) for part in range(num_parts)]

    assert [{number for number, _ in take(part, steps)} for part in parts] == numbers


def test_of_a_slot_that_two_processes_have_nothing_is_gone_on_from() -> None:
    assert take(Slots(1, 1, 2), [("a", (1,)), ("a", (1,))]) == [(0, False), (0, False)]


@given(
    total=st.integers(1, 3),
    steps=st.lists(
        st.tuples(
            st.sampled_from("abc"), st.lists(st.integers(0, 2), max_size=3), st.integers(0, 9)
        ),
        max_size=25,
    ),
)
def test_whatever_runs_at_once_a_slot_is_ones_alone_and_holds_what_is_gone_on_from(
    total: int, steps: list[tuple[str, list[int], int]]
) -> None:
    holds: dict[int, str] = {}
    busy: set[int] = set()

    async def use(slots: Slots, owner: str, ids: list[int], num_ticks: int) -> None:
        async with slots.taken(owner, tuple(ids)) as (number, may_go_on):
            assert number not in busy
            assert holds.get(number) == owner or not may_go_on
            busy.add(number)
            holds[number] = owner
            try:
                for _ in range(num_ticks):
                    await asyncio.sleep(0)
            finally:
                busy.discard(number)

    async def talk() -> None:
        slots = Slots(total)
        using = [asyncio.create_task(use(slots, *step)) for step in steps]
        await asyncio.sleep(0)
        for task in using[::4]:
            task.cancel()
        for task in using:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        async with contextlib.AsyncExitStack() as stack:  # none is lost
            numbers = [
                (await stack.enter_async_context(slots.taken("z", ())))[0] for _ in range(total)
            ]
        assert sorted(numbers) == list(range(total))

    asyncio.run(talk())


@given(IDS, IDS, IDS)
def test_as_much_is_shared_as_both_begin_with(
    beginning: list[int], rest: list[int], other: list[int]
) -> None:
    one, two = beginning + rest, beginning + other
    differing = [place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    assert num_shared(one, two) == min([*differing, len(one), len(two)])
