"""A reply told again out of the cache, for a client that wants that."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from pipeline.serve.api.record import Arrival, Record
from pipeline.serve.api.response_cache import (
    MISS_HEADERS,
    Kept,
    Question,
    ResponseCache,
    Wish,
    read_wish,
)
from pipeline.serve.asking.reasoning import shows_reasoning
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.replying.choices import Indexed
from pipeline.serve.replying.events import Said, Tally
from pipeline.serve.routing.endpoint import Answering
from pipeline.serve.routing.route import Route


@dataclass(frozen=True)
class Repeating:
    """The wish of one request, and what it is found by."""

    cache: ResponseCache
    question: Question
    wish: Wish
    route: Route
    request: ChatRequest

    def find(self) -> tuple[Answering, Mapping[str, str], str] | None:
        """An earlier reply, the headers that say so, and its id; None if it must be made."""
        hit = self.cache.look_up(self.question, self.wish)
        if hit is None:
            return None
        kept = hit.kept
        for endpoint in self.route.endpoints:
            if (endpoint.served.slug, endpoint.provider) == (kept.model, kept.provider):
                told = Answering(
                    endpoint,
                    _again(kept),
                    [Tally() for _ in range(kept.num_choices)],
                    shows_reasoning(self.request),
                    any(isinstance(event, Said) and event.logprobs for _, event in kept.events),
                )
                return told, hit.headers, kept.source_id
        return None

    @property
    def headers(self) -> Mapping[str, str]:
        """Of a reply that must be made."""
        return MISS_HEADERS

    def keep(self, record: Record) -> None:
        """What has come of it, if it is whole."""
        endpoint, events = record.answering.endpoint, tuple(record.events)
        num_choices = len(record.answering.tallies)
        served = endpoint.served
        kept = Kept(events, record.id, served.slug, endpoint.provider, num_choices)
        if record.is_whole:
            self.cache.store(self.question, self.wish, kept)


def find_wish(
    cache: ResponseCache,
    arrival: Arrival,
    path: str,
    body: bytes,
    route: Route,
    request: ChatRequest,
) -> Repeating | None:
    """None if the client does not ask for the cache."""
    wish = read_wish(arrival.headers)
    if wish is None:
        return None
    served = route.endpoints[0].served
    question = Question.of(
        arrival.key.id if arrival.key else None,
        f"{served.slug} {served.created}",  # other weights under its name are another model
        path.rstrip("/"),
        is_streamed=bool(request.stream),
        body=body,
    )
    return Repeating(cache, question, wish, route, request)


async def _again(kept: Kept) -> AsyncGenerator[Indexed, None]:
    for indexed in kept.events:
        yield indexed
