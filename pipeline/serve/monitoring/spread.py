"""How durations spread: a histogram that a reply can afford to keep of every event."""

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)


@dataclass
class Spread:
    """Of seconds: how many were at most each of BOUNDS_S, and more than the one before."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    """The last is of those above every bound."""
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def merge(self, other: "Spread") -> None:
        """All of another's."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s
