"""What every answer may carry: ids, names of ignored parameters, errors."""

import secrets
import string
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from pipeline.errors import RequestError

PROVIDER = "Pipeline"
INTERNAL_ERROR = "Internal Server Error"
_LETTERS = string.ascii_letters + string.digits
_MAX_NAMES = 32


def generation_id(created: int) -> str:
    """An id in OpenRouter's form."""
    return f"gen-{created}-{random_letters(20)}"


def ignored_header(names: Sequence[str]) -> str:
    """Names for `X-Ignored-Parameters`; percent-encoded, as a client may send any key."""
    shown = [quote(name[:64], safe="._-~[]") for name in names[:_MAX_NAMES]]
    return ", ".join([*shown, "..."] if len(names) > _MAX_NAMES else shown)


def error_body(error: RequestError) -> dict[str, Any]:
    """The one shape of every failure."""
    metadata = {"error_type": error.error_type}
    return {"error": {"code": error.status, "message": str(error), "metadata": metadata}}


def call_id() -> str:
    """A tool call's id, unique beyond its response."""
    return "call_" + random_letters(24)


def random_letters(count: int) -> str:
    """For ids."""
    return "".join(secrets.choice(_LETTERS) for _ in range(count))
