"""What a check has seen of a server."""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import PipelineError

Verdict = Literal["passed", "failed", "not shown", "not declared"]
"""`not shown`: nothing is wrong, and nothing proves it either."""


@dataclass(frozen=True)
class Seen:
    """How a check ended."""

    verdict: Verdict
    what: str


class Fault(PipelineError):
    """What a server does wrong, in a sentence: the check that meets it has failed."""


def passed(what: str) -> Seen:
    """It is as it should be."""
    return Seen("passed", what)


def not_shown(what: str) -> Seen:
    """The replies were such that it could not be seen."""
    return Seen("not shown", what)


def quoted(text: str) -> str:
    """The beginning of a text, in one line of a table."""
    short = text if len(text) <= 40 else text[:39] + "…"
    return repr(short)
