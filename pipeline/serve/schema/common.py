"""What every answer may carry: ids, names of ignored parameters, errors."""

import secrets
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from pipeline.errors import Availability, RequestError

PROVIDER = "Pipeline"
TOKENIZER = "Qwen3"
DOCS_URL = "https://openrouter.ai/docs"
INTERNAL_ERROR, INTERNAL_STATUS = "Internal Server Error", 500
_MAX_NAMES = 32


def generation_id(created: int) -> str:
    """An id in OpenRouter's form."""
    return f"gen-{created}-{random_letters(20)}"


def ignored_header(names: Sequence[str]) -> str:
    """Names for `X-Ignored-Parameters`; percent-encoded, as a client may send any key."""
    shown = [quote(name[:64], safe="._-~[]") for name in names[:_MAX_NAMES]]
    return ", ".join([*shown, "..."] if len(names) > _MAX_NAMES else shown)


def error_body(
    error: RequestError,
    asked_models: Sequence[str] = (),
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The one shape of every failure; the models are those that the client named."""
    body: dict[str, Any] = {
        "code": error.status,
        "message": str(error),
        "metadata": {"error_type": error.error_type},
    }
    if error.headers:
        body["metadata"]["headers"] = dict(error.headers)
    if error.availability:
        body |= {
            "error_type": error.error_type,
            "http_status": error.status,
            "availability": {
                "code": error.availability.code,
                "retryable": error.availability.retryable,
                "requested_models": list(asked_models),
                "docs_url": DOCS_URL,
                **_others(error.availability, error.retry_after_s),
            },
        }
    return {"error": body} | beside(metadata)


def beside(metadata: dict[str, Any] | None) -> dict[str, Any]:
    """How a request came to its answer, beside that answer; nothing if it is not wanted."""
    return {"openrouter_metadata": metadata} if metadata else {}


def _others(availability: Availability, retry_after_s: int | None) -> dict[str, Any]:
    """What does not apply is left out."""
    body: dict[str, Any] = {}
    if retry_after_s is not None:
        body["retry_after"] = retry_after_s
    if availability.fallback_models:
        body["fallback_models"] = list(availability.fallback_models)
    if availability.excluded_by:
        body["excluded_by"] = list(availability.excluded_by)
    if availability.constraint:
        field, detail = availability.constraint
        body["constraint"] = {"field": field, "detail": detail}
    return body


def call_id() -> str:
    """A tool call's id, unique beyond its response."""
    return "call_" + random_letters(24)


def random_letters(count: int) -> str:
    """For ids."""
    text = secrets.token_urlsafe(2 * count)  # a letter drawn at a time takes 20 times as long
    return text.replace("-", "").replace("_", "")[:count]
