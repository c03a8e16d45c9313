"""A key, its generations and its days on the wire."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.serve.books.keys import Key
from pipeline.serve.books.ledger import DailyUse, Generation
from pipeline.serve.books.spending import Spent
from pipeline.serve.offer.price import usd_number
from pipeline.serve.schema.common import PROVIDER

_OUTPUT = {"completion": "content", "reasoning": "reasoning"}
WORKSPACE = "default"
"""Clients want to know in which one a key is."""


def key_body(key: Key | None, spent: Spent) -> dict[str, Any]:
    """GET /key; None is whoever asks a server that wants no key."""
    is_management = key is not None and key.is_management
    data = {
        "label": key.label if key else "none",
        **_limit(key, spent),
        **_used(spent),
        "is_free_tier": False,
        "is_management_key": is_management,
        "is_provisioning_key": is_management,
        "include_byok_in_limit": False,
        "creator_user_id": None,
        "expires_at": _moment(key.expires_ms) if key else None,
        "rate_limit": {
            "requests": -1,
            "interval": "10s",
            "note": "This field is deprecated and safe to ignore.",
        },
        "allowed_data_regions": ["global"],
        "budgets": [],
        "effective_budget": None,
        # No model is a :free one, so none of these is ever used.
        "free_model_daily_requests": {"limit": 0, "remaining": 0, "used": 0},
        "organization_id": None,
        "workspace_id": None,
    }
    return {"data": data}


def managed_key(key: Key, spent: Spent) -> dict[str, Any]:
    """A key as those are told who manage keys; the names of our own limits are ours."""
    return {
        "hash": key.hash,
        "name": key.name,
        "label": key.label,
        "disabled": key.disabled,
        **_limit(key, spent),
        **_used(spent),
        "include_byok_in_limit": False,
        "created_at": _moment(key.created_ms),
        "updated_at": _moment(key.updated_ms),
        "expires_at": _moment(key.expires_ms),
        "last_used_at": _moment(spent.last_ms),
        "creator_user_id": None,
        "external_user": None,
        "workspace_id": WORKSPACE,
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "streams": key.streams,
        "priority": key.priority,
        "models": None if key.models is None else list(key.models),
        "is_management_key": key.is_management,
        "log_content": key.log_content,
    }


def _limit(key: Key | None, spent: Spent) -> dict[str, Any]:
    if key is None or key.limit_picodollars is None:
        reset = key.limit_reset if key else None
        return {"limit": None, "limit_remaining": None, "limit_reset": reset}
    left = max(0, key.limit_picodollars - spent.by_period[key.limit_reset])
    return {
        "limit": usd_number(key.limit_picodollars),
        "limit_remaining": usd_number(left),
        "limit_reset": key.limit_reset,
    }


def _used(spent: Spent) -> dict[str, Any]:
    used = {
        "usage": usd_number(spent.ever),
        "usage_daily": usd_number(spent.today),
        "usage_weekly": usd_number(spent.this_week),
        "usage_monthly": usd_number(spent.this_month),
    }
    return used | {f"byok_{name}": 0 for name in used}


def credits_body(spent: int) -> dict[str, Any]:
    """GET /credits: none are sold; what is used is owed."""
    return {"data": {"total_credits": 0, "total_usage": usd_number(spent)}}


def generation_body(generation: Generation) -> dict[str, Any]:
    """GET /generation."""
    return {"data": _counts(generation) | _course(generation) | _absent()}


def _counts(generation: Generation) -> dict[str, Any]:
    cost = usd_number(generation.cost_picodollars)
    return {
        "total_cost": cost,
        "usage": cost,
        "upstream_inference_cost": 0,
        "is_byok": False,
        "tokens_prompt": generation.prompt_tokens,
        "tokens_completion": generation.completion_tokens,
        "native_tokens_prompt": generation.prompt_tokens,
        "native_tokens_completion": generation.completion_tokens,
        "native_tokens_completion_images": 0,
        "native_tokens_reasoning": generation.reasoning_tokens,
        "native_tokens_cached": generation.cached_tokens,
    }


def _course(generation: Generation) -> dict[str, Any]:
    response = {
        "status": None if generation.error_type else 200,
        "provider_name": generation.provider,
        "latency": generation.latency_ms,
        "is_byok": False,
        "endpoint_id": generation.model,
        "model_permaslug": generation.model,
    }
    return {
        "id": generation.id,
        "created_at": _moment(generation.created_ms),
        "model": generation.model,
        "provider_name": generation.provider,
        "provider_responses": [response],
        "api_type": "completions",
        "data_region": "global",
        "streamed": generation.streamed,
        "cancelled": generation.cancelled,
        "latency": generation.latency_ms,
        "generation_time": generation.generation_ms,
        "finish_reason": generation.finish_reason,
        "native_finish_reason": generation.native_finish_reason,
        "origin": generation.http_referer or "",
        "http_referer": generation.http_referer,
        "external_user": generation.external_user,
        "session_id": generation.session_id,
        "user_agent": generation.user_agent,
        "preset_id": generation.preset,
        "response_cache_source_id": generation.cache_source,
    }


def _absent() -> dict[str, None]:
    """Clients want each of these keys, of what there is none here."""
    names = (
        "app_id",
        "cache_discount",
        "moderation_latency",
        "num_fetches",
        "num_input_audio_prompt",
        "num_media_completion",
        "num_media_prompt",
        "num_search_results",
        "request_id",
        "router",
        "service_tier",
        "upstream_id",
        "web_search_engine",
        "workspace_id",
    )
    return dict.fromkeys(names)


def content_body(line: Mapping[str, Any]) -> dict[str, Any]:
    """GET /generation/content, of the first choice; calls are told beside what clients know."""
    asked = {name: line[name] for name in ("messages", "prompt") if name in line}
    first = (line.get("choices") or [{}])[0]
    output = {name: first.get(key) or None for name, key in _OUTPUT.items()}
    if calls := first.get("tool_calls"):
        output["tool_calls"] = calls
    return {"data": {"input": asked, "output": output, "error": _content_error(line)}}


def _content_error(line: Mapping[str, Any]) -> dict[str, Any] | None:
    error = line.get("error")
    if error is None:
        return None
    return {
        "message": error.get("message"),
        "status": error.get("status"),
        "provider_name": line.get("provider"),
        "previous_errors": [],
        "raw": None,
    }


def activity_body(uses: Sequence[DailyUse]) -> dict[str, Any]:
    """GET /activity: an item for each day and model."""
    return {"data": [_activity_item(use) for use in uses]}


def _activity_item(use: DailyUse) -> dict[str, Any]:
    return {
        "date": use.day.isoformat(),
        "model": use.model,
        "model_permaslug": use.model,
        "endpoint_id": use.model,
        "provider_name": PROVIDER,
        "usage": usd_number(use.cost_picodollars),
        "byok_usage_inference": 0,
        "requests": use.requests,
        "prompt_tokens": use.prompt_tokens,
        "completion_tokens": use.completion_tokens,
        "reasoning_tokens": use.reasoning_tokens,
        "cached_tokens": use.cached_tokens,
    }


def _moment(time_ms: int | None) -> str | None:
    """ISO 8601, in UTC."""
    if time_ms is None:
        return None
    moment = datetime.datetime.fromtimestamp(time_ms / 1000, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
