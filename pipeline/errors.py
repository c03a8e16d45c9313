"""Failures a user can act on: each exception writes its own sentence from facts.

PipelineError            exit code 2
├── RecipeError          a recipe that cannot be read or is not valid
├── DataError            a row or file that cannot be used; names path:line
├── BaseError            a base that cannot be found, fetched or read
├── RunError             a run folder without what a stage needs
├── EngineError          an engine that is missing, will not start or has died
│   ├── EngineDown       no engine is there now, but one may be soon
│   ├── EngineTimeout    an engine that has been silent for too long
│   └── EngineRefused    the engine will not do what it was asked, nor would another
├── BooksError           keys and ledger that cannot be opened, or written to
├── GateMissed           exit code 3: a certificate or a quality gate was missed
├── Interrupted          exit code 130: Ctrl-C; says where the work goes on
└── RequestError         an HTTP request that cannot be answered; carries its status
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


class PipelineError(Exception):
    """Something the user can mend; `str()` is one sentence: what, where, what to do."""

    exit_code = 2


class RecipeError(PipelineError):
    """A recipe that cannot be read or does not say what a recipe may say."""


class DataError(PipelineError):
    """A data file or row that cannot be used."""

    @classmethod
    def at(cls, path: Path | str, line: int, what: str) -> "DataError":
        """The usual form: `path:line: what`."""
        return cls(f"{path}:{line}: {what}")


class BaseError(PipelineError):
    """A base checkpoint that cannot be found, fetched or read."""


class RunError(PipelineError):
    """A run folder that lacks what a stage needs, or cannot be written."""


class EngineError(PipelineError):
    """An inference engine that is missing, will not start or has died."""


class EngineDown(EngineError):
    """No engine is there now; `retry_after_s` is when one may be. Nothing has been generated."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineTimeout(EngineError):
    """An engine that has been silent for too long, in the middle of an answer or before it."""


class EngineRefused(EngineError):
    """The engine is well and will not do what it was asked; nor would another of its kind."""


class BooksError(PipelineError):
    """A database of keys and generations that cannot be opened, or written to."""


class GateMissed(PipelineError):
    """A certificate or quality gate was missed; what was measured is on disk."""

    exit_code = 3


class Interrupted(PipelineError):
    """The user stopped the work, and it was saved."""

    exit_code = 130


@dataclass(frozen=True)
class Availability:
    """Why no model answers, in words for a client that would ask another."""

    code: str
    """One of OpenRouter's: model_not_found, no_endpoints, temporarily_unavailable, …"""
    retryable: bool = False
    fallback_models: tuple[str, ...] = ()
    """What would answer instead."""
    excluded_by: tuple[str, ...] = ()
    """OpenRouter's names of what rules every endpoint out."""
    constraint: tuple[str, str] | None = None
    """The field of the request that rules every model out, and how."""


class RequestError(PipelineError):
    """A request that cannot be answered; `status` and `error_type` are what the client sees.

    The headers go with the response, and into its body too.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        error_type: str = "invalid_request",
        retry_after_s: int | None = None,
        availability: Availability | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.retry_after_s = retry_after_s
        self.availability = availability
        self.headers = headers or {}
