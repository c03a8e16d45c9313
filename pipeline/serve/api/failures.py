"""Any failure as a client may see it."""

import logging

from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError

from pipeline.errors import (
    Availability,
    EngineDown,
    EngineError,
    EngineRefused,
    EngineTimeout,
    RequestError,
)
from pipeline.serve.books.database import why
from pipeline.serve.schema import INTERNAL_ERROR

_BOOKS_AWAY = (OperationalError, InterfaceError, TimeoutError)
_BOOKS_WAIT_S = 5

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
    if isinstance(error, _BOOKS_AWAY):
        log.error("the books do not answer: %s", why(error))
        availability = Availability("temporarily_unavailable", retryable=True)
        what = "The books of this server do not answer; try again"
        return RequestError(what, 503, "provider_overloaded", _BOOKS_WAIT_S, availability)
    log.error("a request failed", exc_info=error)
    return RequestError(INTERNAL_ERROR, 500, "server")


def is_passing(failure: RequestError) -> bool:
    """Whether it is the endpoint's, so that another one of the same model may do better."""
    return failure.status == 429 or failure.status >= 500
