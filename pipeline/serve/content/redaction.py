"""The operator's own function, through which every entry goes before it is written."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.serve.content.entry import Line

Redact = Callable[[Line], Any]
"""Gives an entry back as it may be kept, or None for one that may not."""


class RedactionError(Exception):
    """What the function did instead, without a word of what it was given."""


def find_redaction(name: str) -> Redact:
    """The function of MODULE:FUNCTION; PipelineError if there is none."""
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # last, so that no file there takes the place of a library
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        what = f"{module_name} cannot be imported from {here}: {type(error).__name__}: {error}"
        raise PipelineError(f"content.redact: {what}") from error
    found: Redact | None = getattr(module, function_name, None)
    if not callable(found):
        raise PipelineError(f"content.redact: {module_name} has no function {function_name}")
    return found


def redacted(line: Line, redact: Redact) -> Line | None:
    """As it may be kept; RedactionError if the function fails."""
    try:
        kept = redact(line)
    except Exception as error:  # noqa: BLE001 - it is the operator's, and may do anything
        # Neither its words nor its cause: they may quote what was to be kept out.
        raise RedactionError(f"the redaction raised {type(error).__name__}") from None
    if kept is not None and not isinstance(kept, dict):
        raise RedactionError(f"the redaction returned {type(kept).__name__}, no dict")
    return kept
