"""The shapes of failures, for the description."""

from typing import Any, Literal

from pipeline.serve.openapi.shape import Shape


class Availability(Shape):
    """Why no model answers, for a client that would ask another."""

    code: str
    retryable: bool
    requested_models: list[str]
    docs_url: str
    retry_after: int | None = None
    """Seconds."""
    fallback_models: list[str] | None = None
    """What would answer instead."""
    excluded_by: list[str] | None = None
    constraint: dict[str, str] | None = None


class ErrorMetadata(Shape):
    """For programs."""

    error_type: str
    headers: dict[str, str] | None = None
    """Those of a rate limit that was reached."""


class ErrorObject(Shape):
    """What was wrong, where, and what to do."""

    code: int
    """The HTTP status."""
    message: str
    metadata: ErrorMetadata
    error_type: str | None = None
    http_status: int | None = None
    availability: Availability | None = None


class ErrorAnswer(Shape):
    """Every failure before a reply has begun."""

    error: ErrorObject
    openrouter_metadata: dict[str, Any] | None = None


class ResponsesError(ErrorAnswer):
    """A failure of /responses."""

    error_type: str


class MessagesErrorObject(Shape):
    """In Anthropic's words, and in OpenRouter's."""

    type: str
    message: str
    error_type: str
    availability: Availability | None = None


class MessagesError(Shape):
    """A failure of /messages."""

    type: Literal["error"]
    error: MessagesErrorObject
    request_id: str | None
    openrouter_metadata: dict[str, Any] | None = None
