"""Where a model is served, on the wire: by this machine, and by servers elsewhere."""

from collections.abc import Sequence
from typing import Any

from pipeline.serve.offer.catalog import Served
from pipeline.serve.routing.endpoint import Endpoint
from pipeline.serve.schema.models import architecture, description, pricing

_HEALTHY, _DOWN = 0, -10
Seen = tuple[Endpoint, bool]
"""An endpoint, and whether it is well."""


def endpoints_body(served: Served, endpoints: Sequence[Seen]) -> dict[str, Any]:
    """GET /models/AUTHOR/SLUG/endpoints."""
    data = {
        "id": served.slug,
        "name": served.shown_title,
        "created": served.created,
        "description": description(served),
        "architecture": architecture(),
        "endpoints": [endpoint_document(*seen) for seen in endpoints],
    }
    return {"data": data}


def all_endpoints_body(endpoints: Sequence[Seen]) -> dict[str, Any]:
    """GET /endpoints/zdr: those that keep no word of a request."""
    return {"data": [endpoint_document(*seen) for seen in endpoints if seen[0].keeps_nothing]}


def endpoint_document(endpoint: Endpoint, is_healthy: bool) -> dict[str, Any]:
    """What was not measured, or is not known, is null."""
    served, parameters = endpoint.served, endpoint.parameters
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
        "status": _HEALTHY if is_healthy else _DOWN,
        "uptime_last_5m": None,
        "uptime_last_30m": None,
        "uptime_last_1d": None,
        "supports_implicit_caching": True,
        "supports_voice_cloning": False,
        "supports_diarization": False,
        "supports_tool_choice": {
            "auto": True,
            "none": True,
            "function": can_choose,
            "required": can_choose,
        },
        "latency_last_30m": None,
        "throughput_last_30m": None,
        "native_tools": {},
        "service_tier": None,
    }


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
