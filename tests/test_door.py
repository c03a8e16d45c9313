"""The queue before an engine: who begins next, and who is sent away, whatever comes and goes."""

import asyncio
import collections
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RequestError
from pipeline.serve.offer.door import Door, Guest


class Crowd:
    """Guests that stay inside until they are let out, and what became of each."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.begun: list[str] = []
        self.refused: list[str] = []
        self.told: set[tuple[int, float | None]] = set()
        self.visits: dict[str, asyncio.Task[None]] = {}
        self.over: dict[str, asyncio.Event] = {}

    async def send(self, name: str, who: str, priority: int = 0) -> None:
        self.over[name] = asyncio.Event()
        self.visits[name] = asyncio.create_task(self._visit(name, Guest(who, priority)))
        await settle()

    async def let_out(self, name: str) -> None:
        self.over[name].set()
        await settle()

    async def hang_up(self, name: str) -> None:
        self.visits[name].cancel()
        await settle()

    async def _visit(self, name: str, guest: Guest) -> None:
        try:
            async with self.door.entered(guest):
                self.begun.append(name)
                await self.over[name].wait()
        except RequestError as error:
            self.told.add((error.status, error.retry_after_s))
            self.refused.append(name)


async def settle() -> None:
    """Until nothing more happens by itself."""
    for _ in range(5):
        await asyncio.sleep(0)


def visit(
    guests: Sequence[tuple[str, str, int]], max_inside: int | None = None, slots: int | None = 1
) -> tuple[list[str], list[str]]:
    """Who begins, in order, if each leaves when it is done, and who is sent away."""

    async def talk() -> tuple[list[str], list[str]]:
        crowd = Crowd(Door(max_inside, slots))
        for name, who, priority in guests:
            await crowd.send(name, who, priority)
        for name in crowd.begun:  # which grows meanwhile
            await crowd.let_out(name)
        assert crowd.door.num_inside == crowd.door.num_waiting == 0
        assert crowd.told <= {(429, 1)}
        return crowd.begun, crowd.refused

    return asyncio.run(talk())


def test_one_that_sends_many_does_not_hold_up_one_that_sends_few() -> None:
    many = [(f"many-{number}", "many", 0) for number in range(5)]
    few = [(f"few-{number}", "few", 0) for number in range(2)]

    begun, refused = visit([*many, *few])

    assert begun == ["many-0", "few-0", "many-1", "few-1", "many-2", "many-3", "many-4"]
    assert refused == []


def test_a_higher_priority_goes_first_and_what_has_begun_is_let_be() -> None:
    guests = [("a", "x", 0), ("low", "y", -1), ("b", "x", 0), ("high", "x", 1)]

    assert visit(guests)[0] == ["a", "high", "b", "low"]


def test_in_a_full_queue_nobody_keeps_others_from_their_place() -> None:
    many = [(f"many-{number}", "many", 0) for number in range(6)]

    begun, refused = visit([*many, ("few-0", "few", 0), ("few-1", "few", 0)], max_inside=4)

    assert sorted(begun) == ["few-0", "few-1", "many-0", "many-1"]
    assert refused == ["many-4", "many-5", "many-3", "many-2"], "the latest leave first"


def test_in_a_full_queue_a_higher_priority_takes_the_place_of_a_lower_one() -> None:
    guests = [("a", "x", 0), ("b", "y", 0), ("low", "z", -1), ("c", "u", 0), ("d", "v", 0)]

    assert visit(guests, max_inside=3) == (["a", "b", "c"], ["low", "d"])


def test_who_would_be_sent_away_is_known_without_going_in() -> None:
    async def talk() -> None:
        crowd = Crowd(Door(2, 1))
        for name, who in (("a", "x"), ("b", "x")):
            await crowd.send(name, who)
        crowd.door.check(Guest("y"))
        crowd.door.check(Guest("x", 1))
        with pytest.raises(RequestError, match="as many requests wait"):
            crowd.door.check(Guest("x"))
        assert (crowd.door.num_inside, crowd.refused) == (2, [])
        for name in ("a", "b"):
            await crowd.let_out(name)
        crowd.door.check(Guest("x"))

    asyncio.run(talk())


def test_who_has_begun_is_never_sent_away() -> None:
    guests = [("a", "x", -1), ("b", "x", -1), ("c", "y", 1)]

    assert visit(guests, max_inside=2, slots=2)[1] == ["c"]


@pytest.mark.parametrize("slots", [None, 3])
def test_while_there_is_room_nobody_waits(slots: int | None) -> None:
    async def talk() -> None:
        crowd = Crowd(Door(None, slots))
        for number in range(3):
            await crowd.send(str(number), "x")
        assert (crowd.begun, crowd.door.num_waiting) == (["0", "1", "2"], 0)
        for name in crowd.begun:
            await crowd.let_out(name)

    asyncio.run(talk())


def test_a_door_that_is_widened_lets_in_who_waits() -> None:
    async def talk() -> None:
        crowd = Crowd(Door(3, 1))
        for number in range(3):
            await crowd.send(str(number), "x")
        crowd.door.resize(3, 2)
        await settle()
        assert (crowd.begun, crowd.door.num_waiting) == (["0", "1"], 1)
        for name in ("0", "1", "2"):
            await crowd.let_out(name)

    asyncio.run(talk())


class Play:
    """A crowd and what should be known of it."""

    def __init__(self, slots: int, room: int, data: st.DataObject) -> None:
        self.slots = slots
        self.places = slots + room
        self.draw = data.draw
        self.crowd = Crowd(Door(self.places, slots))
        self.senders: dict[str, str] = {}
        self.ended: set[str] = set()

    @property
    def inside(self) -> list[str]:
        gone = self.ended.union(self.crowd.refused)
        return [name for name in self.senders if name not in gone]

    @property
    def making(self) -> list[str]:
        return [name for name in self.inside if name in self.crowd.begun]

    @property
    def waiting(self) -> list[str]:
        return [name for name in self.inside if name not in self.crowd.begun]

    async def send(self, name: str) -> None:
        waiting = self.waiting
        self.senders[name] = who = self.draw(st.sampled_from("abc"))
        await self.crowd.send(name, who)
        if name in self.crowd.refused:
            counts = collections.Counter(self.senders[other] for other in self.inside)
            assert all(counts[self.senders[other]] <= counts[who] + 1 for other in waiting)

    async def leave(self, *, one_hangs_up: bool) -> None:
        """One that has been answered, and perhaps at the same moment one that still waits."""
        name = self.draw(st.sampled_from(self.making))
        other = self.draw(st.sampled_from(self.waiting)) if one_hangs_up and self.waiting else ""
        self.ended |= {name, other}
        self.crowd.over[name].set()
        if other:
            # Before its turn comes, or when it has come and is not known yet.
            for _ in range(self.draw(st.integers(0, 1))):
                await asyncio.sleep(0)
            self.crowd.visits[other].cancel()
        await settle()

    async def hang_up(self, name: str) -> None:
        self.ended.add(name)
        await self.crowd.hang_up(name)

    def check(self) -> None:
        assert len(self.making) == min(self.slots, len(self.inside))
        assert self.crowd.door.num_inside == len(self.inside) <= self.places
        assert self.crowd.door.num_waiting == len(self.waiting)


@given(data=st.data(), slots=st.integers(1, 3), room=st.integers(0, 4))
def test_whatever_comes_and_goes_the_bounds_hold_and_nobody_is_forgotten(
    data: st.DataObject, slots: int, room: int
) -> None:
    async def talk() -> None:
        play = Play(slots, room, data)
        steps = st.sampled_from(["send", "send", "leave", "both", "hang up"])
        for number, step in enumerate(data.draw(st.lists(steps, max_size=40))):
            if step == "send" or not play.making:
                await play.send(str(number))
            elif step == "hang up":
                await play.hang_up(data.draw(st.sampled_from(play.inside)))
            else:
                await play.leave(one_hangs_up=step == "both")
            play.check()
        for name in play.inside:
            await play.hang_up(name)
        play.check()

    asyncio.run(talk())
