"""One reply from its request's arrival to its row in the ledger."""

import contextlib
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RequestError
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.books.keys import Key
from pipeline.serve.books.ledger import Generation
from pipeline.serve.content.entry import Entry, Spoken
from pipeline.serve.content.log import wants_content
from pipeline.serve.monitoring.spread import Spread
from pipeline.serve.offer.price import NOTHING, Cost, Price
from pipeline.serve.replying.choices import Indexed, whole_usage
from pipeline.serve.replying.events import Ended, Usage
from pipeline.serve.routing.endpoint import Answering
from pipeline.serve.schema import generation_id

_MAX_LABEL = 256
_HUNG_UP = 499


@dataclass(frozen=True)
class Arrival:
    """A request as it came, and the id that its reply is to have, whoever makes it."""

    id: str
    key: Key | None
    """None where the server wants no key."""
    headers: Mapping[str, str]
    created_s: float
    """Since the epoch."""
    begun_s: float
    """The same moment by the monotonic clock."""

    @classmethod
    def now(cls, key: Key | None, headers: Mapping[str, str], created_s: float) -> "Arrival":
        """At this moment, which is that long after the epoch."""
        return cls(generation_id(int(created_s)), key, headers, created_s, time.monotonic())

    @property
    def created(self) -> int:
        """Unix seconds."""
        return int(self.created_s)

    def label(self, *headers: str) -> str | None:
        """The first of these headers that is there, for the books."""
        text = next((self.headers[name] for name in headers if self.headers.get(name)), None)
        return text[:_MAX_LABEL] if text else None

    def session(self, request: ChatRequest) -> str | None:
        """What requests of one conversation have in common; the body has the last word."""
        said = request.session_id or self.label("x-session-id") or request.prompt_cache_key
        return said[:_MAX_LABEL] if said else None


class Record:
    """What was asked, and what has come of it so far."""

    def __init__(
        self,
        arrival: Arrival,
        request: ChatRequest,
        answering: Answering,
        *,
        cache_source: str | None = None,
        keeps_events: bool = False,
    ) -> None:
        """`cache_source` is the id of the reply that this one repeats."""
        self.answering = answering
        self.id = arrival.id
        self.error: RequestError | None = None
        self.is_booked = False
        self.events: list[Indexed] = []
        """All that came, if they are to be kept."""
        self.gaps = Spread()
        """Between one event and the next."""
        self._arrival = arrival
        self._request = request
        self._cache_source = cache_source
        self.logs_content = wants_content(arrival.key, request)
        """Whether its words are kept for longer than it takes to send them."""
        self._spoken = [Spoken() for _ in answering.tallies] if self.logs_content else []
        self._keeps_events = keeps_events
        self._first_s: float | None = None
        self._last_s = 0.0
        self._ends: list[Ended] = []

    @property
    def usage(self) -> Usage:
        """Of all choices, so far."""
        return whole_usage(self.answering.tallies)

    @property
    def cost(self) -> Cost:
        """Of it; a reply that failed costs nothing, nor does one without a single token."""
        usage = self.usage
        if self.error is not None or self._cache_source or not usage.completion_tokens:
            return NOTHING
        billed = self.answering.tallies[0].cost_picodollars
        if billed is not None:
            return Cost(0, billed)
        return self._price.cost(usage) if self._price else NOTHING

    @property
    def _price(self) -> Price | None:
        """None where its cost is told by others, and of an answer that is told again."""
        is_told = self.answering.tallies[0].cost_picodollars is not None
        return None if is_told or self._cache_source else self.answering.endpoint.price

    @property
    def is_whole(self) -> bool:
        """Whether every choice has come to its end."""
        return len(self._ends) == len(self.answering.tallies) and self.error is None

    @property
    def status(self) -> int:
        """How it has ended, as HTTP has it; 499 is what is said of a client that hung up."""
        if self.error is not None:
            return self.error.status
        return 200 if self.is_whole else _HUNG_UP

    async def noted(self, replies: AsyncGenerator[Indexed, None]) -> AsyncGenerator[Indexed, None]:
        """The same events; closing this closes them."""
        async with contextlib.aclosing(replies):
            async for index, event in replies:
                now_s = time.monotonic()
                if self._first_s is None:
                    self._first_s = now_s
                else:
                    self.gaps.add(now_s - self._last_s)
                self._last_s = now_s
                if isinstance(event, Ended):
                    self._ends.append(event)
                if self._spoken:
                    self._spoken[index].add(event)
                if self._keeps_events:
                    self.events.append((index, event))
                yield index, event

    def generation(self) -> Generation:
        """The row, as things stand: a reply that neither ended nor failed was cancelled."""
        served, usage = self.answering.endpoint.served, self.usage
        failure = "error" if self.error else None
        end = self._ends[0] if self.is_whole else None
        return Generation(
            id=self.id,
            key_id=self._arrival.key.id if self._arrival.key else None,
            model=served.slug,
            provider=self.answering.endpoint.provider,
            artefact_hash=self.answering.endpoint.artefact_hash,
            engine=served.engine_name,
            created_ms=int(self._arrival.created_s * 1000),
            streamed=bool(self._request.stream),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            cached_tokens=usage.cached_tokens,
            finish_reason=end.finish if end else failure,
            native_finish_reason=end.native_finish if end else failure,
            cancelled=end is None and self.error is None,
            error_type=self.error.error_type if self.error else None,
            ignored=self.answering.ignored,
            cost_picodollars=self.cost.total,
            price_version=self._price.version if self._price else None,
            cache_source=self._cache_source,
            **self._times(),
            **self._labels(),
        )

    def entry(self, generation: Generation, path: str) -> Entry:
        """What the content log keeps of it, as things stand; the path is the request's."""
        key = self._arrival.key
        assert key is not None
        return Entry(generation, key.hash, path, self._request, self._spoken, self.error)

    def _times(self) -> dict[str, Any]:
        now_s, begun_s, first_s = time.monotonic(), self._arrival.begun_s, self._first_s
        return {
            "latency_ms": _ms(now_s - begun_s),
            "first_token_ms": None if first_s is None else _ms(first_s - begun_s),
            "generation_ms": None if first_s is None else _ms(now_s - first_s),
        }

    def _labels(self) -> dict[str, Any]:
        arrival, user = self._arrival, self._request.user
        return {
            "http_referer": arrival.label("http-referer"),
            "app_title": arrival.label("x-openrouter-title", "x-title"),
            "user_agent": arrival.label("user-agent"),
            "external_user": user[:_MAX_LABEL] if user else None,
            "session_id": arrival.session(self._request),
            "preset": self._request.preset,
        }


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
