"""Replies kept for a while, for clients that ask the same again and want to hear the same."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.serve.replying.choices import Indexed
from pipeline.serve.replying.events import Called, Ended, Said

DEFAULT_TTL_S, MIN_TTL_S, MAX_TTL_S = 300, 1, 86400
MAX_REPLIES = 10_000
MAX_CHARACTERS = 64 * 2**20
_STATUS = "X-OpenRouter-Cache-Status"
MISS_HEADERS = {_STATUS: "MISS"}
_EVENT_CHARACTERS = 100
"""An event, and each token with a log-probability, takes about this much beside its text."""


@dataclass(frozen=True)
class Wish:
    """What a client that wants the cache says of it."""

    ttl_s: int = DEFAULT_TTL_S
    clears: bool = False
    """Whether what is kept is to be forgotten, and the reply made anew."""


def read_wish(headers: Mapping[str, str]) -> Wish | None:
    """From headers by their names in lower case; None if the client does not ask for the cache."""
    if not _is_true(headers.get("x-openrouter-cache")):
        return None
    return Wish(
        _ttl_s(headers.get("x-openrouter-cache-ttl", "")),
        _is_true(headers.get("x-openrouter-cache-clear")),
    )


@dataclass(frozen=True)
class Question:
    """What must be the same for a reply to be the same."""

    key_id: str | int | None
    """Of the API key: what one has heard is not for another's ears."""
    model: str
    route: str
    """Which dialect it is asked in."""
    is_streamed: bool
    body_hash: bytes

    @classmethod
    def of(
        cls, key_id: str | int | None, model: str, route: str, *, is_streamed: bool, body: bytes
    ) -> "Question":
        """Of a body as it was sent: the order of its fields counts."""
        return cls(key_id, model, route, is_streamed, hashlib.sha256(body).digest())


@dataclass(frozen=True)
class Kept:
    """A whole reply, to be told again."""

    events: tuple[Indexed, ...]
    source_id: str
    """Of the generation that made it."""
    model: str
    """The slug of the model that answered."""
    provider: str
    num_choices: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether every choice has come to its end."""
        return sum(isinstance(event, Ended) for _, event in self.events) == self.num_choices

    @property
    def num_characters(self) -> int:
        """About how much room it takes."""
        return len(self.source_id) + sum(_num_characters(indexed) for indexed in self.events)


@dataclass(frozen=True)
class Hit:
    """A kept reply, and how it is found."""

    kept: Kept
    age_s: int
    ttl_s: int
    """What is left of its time."""

    @property
    def headers(self) -> dict[str, str]:
        """Of the response that tells it again."""
        return {
            _STATUS: "HIT",
            "X-OpenRouter-Cache-Age": str(self.age_s),
            "X-OpenRouter-Cache-TTL": str(self.ttl_s),
            "X-OpenRouter-Cache-Source-Id": self.kept.source_id,
        }


@dataclass(frozen=True)
class _Entry:
    kept: Kept
    stored_s: float
    ttl_s: int
    num_characters: int


class ResponseCache:
    """In memory; of too many the ones that were not asked for longest go."""

    def __init__(
        self,
        max_replies: int = MAX_REPLIES,
        max_characters: int = MAX_CHARACTERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_replies = max_replies
        self._max_characters = max_characters
        self._clock = clock
        self._entries: OrderedDict[Question, _Entry] = OrderedDict()
        self._num_characters = 0

    def look_up(self, question: Question, wish: Wish) -> Hit | None:
        """None if nothing is kept, its time is over, or the client wants it made anew."""
        entry = self._entries.get(question)
        if entry is None:
            return None
        age_s = self._clock() - entry.stored_s
        if wish.clears or age_s >= entry.ttl_s:
            self._drop(question)
            return None
        self._entries.move_to_end(question)
        return Hit(entry.kept, int(age_s), entry.ttl_s - int(age_s))

    def store(self, question: Question, wish: Wish, kept: Kept) -> None:
        """Keep a reply in place of an earlier one; one that broke off, or is huge, is not kept."""
        self._drop(question)
        num_characters = kept.num_characters
        if not kept.is_whole or num_characters > self._max_characters:
            return
        self._entries[question] = _Entry(kept, self._clock(), wish.ttl_s, num_characters)
        self._num_characters += num_characters
        while self._is_too_much:
            self._drop(next(iter(self._entries)))

    def clear(self, models: Sequence[str] | None = None) -> None:
        """Forget what these models have answered, or everything."""
        for question, entry in list(self._entries.items()):
            if models is None or entry.kept.model in models:
                self._drop(question)

    @property
    def _is_too_much(self) -> bool:
        too_many = len(self._entries) > self._max_replies
        return too_many or self._num_characters > self._max_characters

    def _drop(self, question: Question) -> None:
        entry = self._entries.pop(question, None)
        if entry is not None:
            self._num_characters -= entry.num_characters


def _is_true(text: str | None) -> bool:
    return text is not None and text.strip().lower() == "true"


def _ttl_s(text: str) -> int:
    """Seconds within bounds; what is no number is as if it were not there."""
    try:
        asked = int(text)
    except ValueError:
        return DEFAULT_TTL_S
    return min(max(asked, MIN_TTL_S), MAX_TTL_S)


def _num_characters(indexed: Indexed) -> int:
    event = indexed[1]
    if isinstance(event, Said):
        num_tokens = sum(1 + len(token.top) for token in event.logprobs)
        return len(event.text) + _EVENT_CHARACTERS * (1 + num_tokens)
    if isinstance(event, Called):
        return len(event.call.name) + len(event.call.arguments) + _EVENT_CHARACTERS
    return _EVENT_CHARACTERS
