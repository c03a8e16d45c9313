"""Whose prompts an engine's slots still hold, so that nobody goes on from another's."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Hashable, Sequence
from dataclasses import dataclass


@dataclass
class _Slot:
    number: int
    owner: Hashable = None
    """Of what it holds; None is not known."""
    held_ids: Sequence[int] = ()
    turn: int = -1
    """When it was last taken."""


class Slots:
    """The slots of an engine that are ours to choose from."""

    def __init__(self, total: int, part: int = 0, num_parts: int = 1) -> None:
        """Of `total`, those of one of the processes that share the engine.

        With more processes than slots, two have one, and what it holds is never gone on from.
        """
        numbers = range(part, total, num_parts) or [part % total]
        self._is_shared = num_parts > total
        self._free = [_Slot(number) for number in numbers]
        self._room = asyncio.Semaphore(len(self._free))
        self._turns = itertools.count()

    @contextlib.asynccontextmanager
    async def taken(
        self, owner: Hashable, prompt_ids: Sequence[int]
    ) -> AsyncIterator[tuple[int, bool]]:
        """A slot's number, once one is free, and whether what it holds may be gone on from."""
        async with self._room:
            prompt_ids = list(prompt_ids)
            slot = self._choose(owner, prompt_ids)
            may_go_on = slot.owner == owner and not self._is_shared
            slot.owner, slot.held_ids, slot.turn = owner, prompt_ids, next(self._turns)
            self._free.remove(slot)
            try:
                yield slot.number, may_go_on
            finally:
                self._free.append(slot)

    def _choose(self, owner: Hashable, prompt_ids: Sequence[int]) -> _Slot:
        """Of the owner's the one that has most of the prompt, else what was longest unused."""
        own = [slot for slot in self._free if slot.owner == owner]
        shared = [num_shared(slot.held_ids, prompt_ids) for slot in own]
        if most := max(shared, default=0):
            return own[shared.index(most)]
        return min(self._free, key=lambda slot: slot.turn)


def num_shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many they begin alike with; both are lists, or both tuples.

    Found by halves, whose comparison costs a nanosecond a token: a prompt has tens of thousands.
    """
    low, high = 0, min(len(ids), len(others))
    while low < high:
        middle = (low + high + 1) // 2
        if ids[low:middle] == others[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
