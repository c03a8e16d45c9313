"""Where a model is served, on the wire: by this machine, and by servers elsewhere."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.serve.books.measured import Percentiles
from pipeline.serve.offer.catalog import Served
from pipeline.serve.routing.endpoint import Endpoint
from pipeline.serve.schema.models import architecture, description, pricing

_HEALTHY, _DOWN = 0, -10


@dataclass(frozen=True)
class Seen:
    """An endpoint, and what is told of it."""

    endpoint: Endpoint
    is_healthy: bool
    shows_speed: bool
    """As the official service does to whoever sends a key."""


def endpoints_body(served: Served, endpoints: Sequence[Seen]) -> dict[str, Any]:
    """GET /models/AUTHOR/SLUG/endpoints."""
    data = {
        "id": served.slug,
        "name": served.shown_title,
        "created": served.created,
        "description": description(served),
        "architecture": architecture(),
        "endpoints": [endpoint_document(seen) for seen in endpoints],
    }
    return {"data": data}


def all_endpoints_body(endpoints: Sequence[Seen]) -> dict[str, Any]:
    """GET /endpoints/zdr: those that keep no word of a request."""
    return {"data": [endpoint_document(seen) for seen in endpoints if seen.endpoint.keeps_nothing]}


def endpoint_document(seen: Seen) -> dict[str, Any]:
    """What was not measured, or is not known, is null."""
    endpoint = seen.endpoint
    served, parameters, measured = endpoint.served, endpoint.parameters, endpoint.measured
    can_choose = "tool_choice" in parameters
    return {
        "name": f"{endpoint.provider} | {served.slug}",
        "model_id": served.slug,
        "model_name": served.shown_title,
        "context_length": served.context_tokens,
        "pricing": {**pricing(endpoint.price or served.price), "discount": 0},
        "provider_name": endpoint.provider,
        "tag": endpoint.tag,
        "quantization": endpoint.quantization,
        "max_completion_tokens": served.max_completion_tokens,
        "max_prompt_tokens": None,
        "supported_parameters": sorted(parameters),
        "status": _HEALTHY if seen.is_healthy else _DOWN,
        "uptime_last_5m": measured.uptime_last_5m,
        "uptime_last_30m": measured.uptime_last_30m,
        "uptime_last_1d": measured.uptime_last_1d,
        "supports_implicit_caching": True,
        "supports_voice_cloning": False,
        "supports_diarization": False,
        "supports_tool_choice": {
            "auto": True,
            "none": True,
            "function": can_choose,
            "required": can_choose,
        },
        "latency_last_30m": _percentiles(measured.latency_ms if seen.shows_speed else None),
        "throughput_last_30m": _percentiles(measured.throughput if seen.shows_speed else None),
        "native_tools": {},
        "service_tier": None,
    }


def _percentiles(found: Percentiles | None) -> dict[str, float] | None:
    return asdict(found) if found else None


def providers_body(providers: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """GET /providers: who answers, each by name and slug."""
    unknown = dict.fromkeys(
        (
            "privacy_policy_url",
            "terms_of_service_url",
            "status_page_url",
            "headquarters",
            "datacenters",
        )
    )
    return {"data": [{"name": name, "slug": slug, **unknown} for name, slug in providers]}
