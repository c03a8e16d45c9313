"""What tokens cost: whole pico-dollars, so that sums over many replies are exact."""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from pipeline.serve.replying.events import Usage

PICODOLLARS = 10**12
"""In a US dollar."""


@dataclass(frozen=True)
class Cost:
    """Of one reply, in pico-dollars; a price for each request is part of its prompt's."""

    prompt: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.prompt + self.completion


NOTHING = Cost()


@dataclass(frozen=True)
class Price:
    """In pico-dollars."""

    prompt: int = 0
    """A token, as of the next two."""
    completion: int = 0
    """Reasoning included."""
    cached: int | None = None
    """Of the prompt's that the engine had in its cache; None is as any other of them."""
    request: int = 0

    @property
    def is_free(self) -> bool:
        """Whether nothing costs anything."""
        return not (self.prompt or self.completion or self.cached or self.request)

    @property
    def version(self) -> str:
        """What tells it from any other: its four numbers, a dash for none."""
        cached = "-" if self.cached is None else self.cached
        return f"{self.prompt}/{self.completion}/{cached}/{self.request}"

    def cost(self, usage: Usage) -> Cost:
        """Of a reply of this size."""
        cached = self.prompt if self.cached is None else self.cached
        fresh = usage.prompt_tokens - usage.cached_tokens
        prompt = self.request + fresh * self.prompt + usage.cached_tokens * cached
        return Cost(prompt, usage.completion_tokens * self.completion)


FREE = Price()


def parse_usd(text: str) -> int:
    """Pico-dollars of a decimal number of dollars; ValueError for any other text."""
    try:
        amount = Decimal(text) * PICODOLLARS
    except InvalidOperation as error:
        raise ValueError(f"{text!r} is no amount of dollars such as 0.00000005") from error
    if not amount.is_finite() or amount < 0 or amount != amount.to_integral_value():
        raise ValueError(f"{text!r} is no whole number of pico-dollars (0.000000000001) above 0")
    return int(amount)


def usd_text(picodollars: int) -> str:
    """Dollars as the API writes prices: a decimal number without exponent."""
    whole, part = divmod(picodollars, PICODOLLARS)
    return f"{whole}.{part:012d}".rstrip("0").rstrip(".")


def usd_number(picodollars: int) -> float:
    """Dollars as the API writes costs."""
    return picodollars / PICODOLLARS
