"""Where a model is served, on the wire: by this machine and nobody else."""

from collections.abc import Sequence
from typing import Any

from pipeline.serve.catalog import Served
from pipeline.serve.schema.common import PROVIDER
from pipeline.serve.schema.models import PRICING, architecture, description, supported_parameters

_TAG = PROVIDER.lower()
_HEALTHY, _DOWN = 0, -10


def endpoints_body(served: Served, is_healthy: bool) -> dict[str, Any]:
    """GET /models/AUTHOR/SLUG/endpoints."""
    data = {
        "id": served.slug,
        "name": served.name,
        "created": served.created,
        "description": description(served),
        "architecture": architecture(),
        "endpoints": [endpoint_document(served, is_healthy)],
    }
    return {"data": data}


def all_endpoints_body(models: Sequence[tuple[Served, bool]]) -> dict[str, Any]:
    """GET /endpoints/zdr: all of them, as no word of a request is kept; each with its health."""
    return {"data": [endpoint_document(served, is_healthy) for served, is_healthy in models]}


def endpoint_document(served: Served, is_healthy: bool) -> dict[str, Any]:
    """What was not measured, or is not known, is null."""
    can_choose = "grammar" in served.engine.capabilities
    return {
        "name": f"{PROVIDER} | {served.slug}",
        "model_id": served.slug,
        "model_name": served.name,
        "context_length": served.context_tokens,
        "pricing": {**PRICING, "discount": 0},
        "provider_name": PROVIDER,
        "tag": _TAG,
        "quantization": None,
        "max_completion_tokens": served.context_tokens,
        "max_prompt_tokens": None,
        "supported_parameters": supported_parameters(served.engine.capabilities),
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


def providers_body() -> dict[str, Any]:
    """GET /providers."""
    provider = {
        "name": PROVIDER,
        "slug": _TAG,
        "privacy_policy_url": None,
        "terms_of_service_url": None,
        "status_page_url": None,
        "headquarters": None,
        "datacenters": None,
    }
    return {"data": [provider]}
