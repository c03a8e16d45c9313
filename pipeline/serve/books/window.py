"""The last minute, for limits of what may be used in any minute."""

import collections
from dataclasses import dataclass, field

WINDOW_S = 60.0
WAIT_S = 1
"""When to come back for what other requests hold: nobody knows how long they take."""


@dataclass
class Window:
    """What was used in the last minute."""

    used: collections.deque[tuple[float, int]] = field(default_factory=collections.deque)
    """Amounts by when they were."""
    _sum: int = 0

    def add(self, now_s: float, amount: int) -> None:
        """Used at this moment; no moment is before the one last added."""
        self.used.append((now_s, amount))
        self._sum += amount

    def total(self, now_s: float) -> int:
        """All of it."""
        while self.used and self.used[0][0] <= now_s - WINDOW_S:
            self._sum -= self.used.popleft()[1]
        return self._sum

    def wait_s(self, now_s: float, room: int) -> float:
        """Until at most so much is left of it."""
        left = self.total(now_s)
        for used_s, amount in self.used:
            left -= amount
            if left <= room:
                return used_s + WINDOW_S - now_s
        return WAIT_S
