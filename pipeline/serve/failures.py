"""Any failure as a client may see it."""

import logging

from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import (
    Availability,
    EngineDown,
    EngineError,
    EngineRefused,
    EngineTimeout,
    RequestError,
)
from pipeline.serve.schema import INTERNAL_ERROR

log = logging.getLogger(__name__)


def as_request_error(error: Exception) -> RequestError:
    """What is ours to mend goes to the log, and the client is told that something is."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineDown):
        wait_s = error.retry_after_s
        availability = Availability("temporarily_unavailable", retryable=True)
        return RequestError(str(error), 503, "provider_overloaded", wait_s, availability)
    if isinstance(error, EngineRefused):
        return RequestError(str(error))
    if isinstance(error, EngineTimeout):
        log.error("%s", error)
        return RequestError("Provider did not answer in time", 504, "timeout")
    if isinstance(error, EngineError):
        log.error("%s", error)
        return RequestError("Provider returned error", 502, "provider_unavailable")
    if isinstance(error, SQLAlchemyError):
        log.error("the books cannot be used: %s", getattr(error, "orig", type(error).__name__))
        availability = Availability("temporarily_unavailable", retryable=True)
        what = "Keys and their limits cannot be looked up now; try again"
        return RequestError(what, 503, "provider_overloaded", 1, availability)
    log.error("a request failed", exc_info=error)
    return RequestError(INTERNAL_ERROR, 500, "server")


def is_passing(failure: RequestError) -> bool:
    """Whether it is the endpoint's, so that another one of the same model may do better."""
    return failure.status == 429 or failure.status >= 500
