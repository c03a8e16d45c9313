"""From the models a request names to the endpoints that are tried for it, in order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import RequestError
from pipeline.serve.asking.preferences import Preferences, Sort, SortBy
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.offer.catalog import Catalog, Served
from pipeline.serve.routing.choosing import choose
from pipeline.serve.routing.endpoint import Endpoint
from pipeline.serve.schema import PARAMETERS

_SORTS: Mapping[str, Sort] = {"floor": "price", "nitro": "throughput"}
Strategy = Literal["direct", "free", "latest", "alias", "fallback"]
"""How the model was found, in OpenRouter's words."""


@dataclass(frozen=True)
class Route:
    """Where a request may be answered."""

    requested: str
    """As the client wrote it; the default model's slug if it wrote none."""
    strategy: Strategy
    endpoints: tuple[Endpoint, ...]
    """In the order they are tried; at least one."""


def find_route(
    request: ChatRequest, catalog: Catalog, endpoints_of: Callable[[Served], Sequence[Endpoint]]
) -> Route:
    """RequestError of the last model named, where none of them can be asked.

    EngineDown while the server is about to stop.
    """
    asked = asked_models(request)
    wanted = request.provider or Preferences()
    found: list[list[Endpoint]] = []
    refusal: RequestError | None = None
    for model in asked or (None,):
        try:
            served = catalog.find(model)
            chosen = choose(endpoints_of(served), _sorted_as(model, wanted), _present(request))
        except RequestError as error:
            refusal = error
            continue
        found.append(chosen[:1] if wanted.allow_fallbacks is False else chosen)
    if not found:
        assert refusal is not None
        raise refusal
    endpoints = [endpoint for chosen in found for endpoint in chosen]
    if wanted.is_across_models or request.route == "sort":
        endpoints = choose(endpoints, wanted, frozenset())
    first = found[0][0].served
    strategy = _strategy(asked, first)
    return Route(asked[0] if asked else first.slug, strategy, tuple(endpoints))


def asked_models(request: ChatRequest) -> tuple[str, ...]:
    """As the client wrote them, each once, the preferred one first."""
    named = [request.model, *(request.models or ())]
    return tuple(dict.fromkeys(model for model in named if model))


def _present(request: ChatRequest) -> frozenset[str]:
    """The parameters that the request has, of those that a catalogue speaks of."""
    given = {name for name in request.model_fields_set if getattr(request, name) is not None}
    given |= {name for name, value in (request.model_extra or {}).items() if value is not None}
    return frozenset(given & PARAMETERS)


def _strategy(asked: Sequence[str], first: Served) -> Strategy:
    if len(asked) > 1:
        return "fallback"
    if asked and asked[0].startswith("~"):
        return "latest"
    if first.variant == "free":
        return "free"
    if asked and asked[0].lower() in {alias.lower() for alias in first.aliases}:
        return "alias"
    return "direct"


def _sorted_as(model: str | None, wanted: Preferences) -> Preferences:
    """What the end of a model's id asks for, too."""
    by = _SORTS.get((model or "").lower().rpartition(":")[2])
    return wanted.model_copy(update={"sort": SortBy(by=by)}) if by else wanted
