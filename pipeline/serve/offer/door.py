"""How many requests an engine may have before it: the rest are told at once to come back."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass
class Door:
    """One for each engine, shared by the models that it makes."""

    max_inside: int | None = None
    """Being answered and waiting for it, together; None lets everybody in."""
    num_inside: int = 0
    slots: int | None = None
    """Replies that the engine makes at once; None is not known."""

    @property
    def num_waiting(self) -> int:
        """Of those inside, how many the engine has not begun with."""
        return max(0, self.num_inside - self.slots) if self.slots else 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """While a request is answered; RequestError 429 where there is no room to wait in.

        A router asks elsewhere then, and a reply that waits long for its turn is of no use to it.
        """
        if self.max_inside is not None and self.num_inside >= self.max_inside:
            raise RequestError(
                "Rate limit exceeded: as many requests wait for this model as may",
                429,
                "rate_limit_exceeded",
                WAIT_S,
                Availability("capacity_exhausted", retryable=True),
                rate_limit_headers(self.max_inside, 0, time.time() + WAIT_S),
            )
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1
