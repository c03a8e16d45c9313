"""The bounded queue before an engine: who begins next, and who is told at once to come back."""

import asyncio
import collections
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass, field

from pipeline.errors import Availability, RequestError

WAIT_S = 1
"""When who was turned away may try again."""


def rate_limit_headers(limit: int, remaining: int, reset_s: float) -> dict[str, str]:
    """Of a 429, and of nothing else; it is over then, by seconds since the epoch."""
    return {
        "X-RateLimit-Limit": str(limit),
        "X-RateLimit-Remaining": str(remaining),
        "X-RateLimit-Reset": str(int(reset_s * 1000)),
    }


@dataclass(frozen=True)
class Guest:
    """Whose request wants in."""

    who: Hashable = None
    """Between whom the queue is fair: a key."""
    priority: int = 0
    """Of those that wait, the highest goes first."""


ANYBODY = Guest()


@dataclass(frozen=True, eq=False)
class _Waiting:
    begun: "asyncio.Future[None]"
    number: int
    """Who came earlier has a lower one."""

    @property
    def has_begun(self) -> bool:
        """Whether its turn has come: it was neither given up nor sent away before."""
        begun = self.begun
        return begun.done() and not begun.cancelled() and begun.exception() is None


@dataclass
class Door:
    """One for each engine, shared by the models that it makes.

    Those of one priority take turns, whoever has the fewest replies being made first. In a full
    queue a request takes the place of one of a lower priority, or of one by whom at least two more
    are inside than by its own sender: nobody can fill it so that others find no room.
    """

    max_inside: int | None = None
    """Being answered and waiting for it, together; None lets everybody in."""
    slots: int | None = None
    """Replies that the engine makes at once; None is not known, and then nobody waits here."""
    _making: collections.Counter[Hashable] = field(default_factory=collections.Counter)
    """Replies by whose they are."""
    _waiting: dict[Guest, list[_Waiting]] = field(default_factory=dict)
    """In the order in which they came, and none without anybody: keys are few, requests many."""
    _turns: dict[Hashable, int] = field(default_factory=dict)
    """Of those inside, when each last began one."""
    _clock: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def num_inside(self) -> int:
        """Being answered, or waiting for it."""
        return self._making.total() + self.num_waiting

    @property
    def num_waiting(self) -> int:
        """Of those inside, how many have not begun."""
        return sum(map(len, self._waiting.values()))

    def resize(self, max_inside: int | None, slots: int | None) -> None:
        """Whoever is inside stays."""
        self.max_inside, self.slots = max_inside, slots
        self._begin()

    def check(self, guest: Guest) -> None:
        """Raise what `entered` would, before any work is done for it."""
        self._find_least(guest)

    @contextlib.asynccontextmanager
    async def entered(self, guest: Guest = ANYBODY) -> AsyncIterator[None]:
        """While a request is answered, once it is its turn.

        RequestError 429 where there is no room to wait in. A router asks elsewhere then, and a
        reply that waits long for its turn is of no use to it.
        """
        if least := self._find_least(guest):
            latest = self._waiting[least][-1]
            self._remove(least, latest)
            if not latest.begun.cancelled():
                latest.begun.set_exception(self._refusal())
        await self._wait(guest)
        try:
            yield
        finally:
            self._leave(guest)

    async def _wait(self, guest: Guest) -> None:
        begun = asyncio.get_running_loop().create_future()
        waiting = _Waiting(begun, next(self._clock))
        self._waiting.setdefault(guest, []).append(waiting)
        self._begin()
        try:
            await begun
        except asyncio.CancelledError:
            if waiting in self._waiting.get(guest, ()):
                self._remove(guest, waiting)
            elif waiting.has_begun:  # at that very moment
                self._leave(guest)
            raise

    def _remove(self, guest: Guest, waiting: _Waiting) -> None:
        self._waiting[guest].remove(waiting)
        if not self._waiting[guest]:
            del self._waiting[guest]

    def _leave(self, guest: Guest) -> None:
        self._making[guest.who] -= 1
        self._begin()
        if not self._num_inside_of(guest.who):
            del self._making[guest.who]
            self._turns.pop(guest.who, None)

    def _begin(self) -> None:
        """As many as the engine has room for."""
        while self._waiting and (self.slots is None or self._making.total() < self.slots):
            guest = min(self._waiting, key=self._rank)
            following = self._waiting[guest][0]
            self._remove(guest, following)
            if following.begun.cancelled():
                continue
            self._making[guest.who] += 1
            self._turns[guest.who] = next(self._clock)
            following.begun.set_result(None)

    def _rank(self, guest: Guest) -> tuple[int, int, int, int]:
        turn = self._turns.get(guest.who, -1)
        return -guest.priority, self._making[guest.who], turn, self._waiting[guest][0].number

    def _find_least(self, guest: Guest) -> Guest | None:
        """Whose latest has to leave for this guest, if anybody's; RequestError if it is this one.

        The more of its sender are inside, the less claim a request has to its place.
        """
        if self.max_inside is None or self.num_inside < self.max_inside:
            return None
        claims = {
            other: (other.priority, -self._num_inside_of(other.who), -waiting[-1].number)
            for other, waiting in self._waiting.items()
        }
        least = min(claims, key=claims.__getitem__, default=None)
        own = (guest.priority, -self._num_inside_of(guest.who) - 1)
        if least is None or claims[least][:2] >= own:
            raise self._refusal()
        return least

    def _refusal(self) -> RequestError:
        most = self.max_inside or 0
        return RequestError(
            "Rate limit exceeded: as many requests wait for this model as may",
            429,
            "rate_limit_exceeded",
            WAIT_S,
            Availability("capacity_exhausted", retryable=True),
            rate_limit_headers(most, 0, time.time() + WAIT_S),
        )

    def _num_inside_of(self, who: Hashable) -> int:
        waiting = (len(those) for guest, those in self._waiting.items() if guest.who == who)
        return self._making[who] + sum(waiting)
