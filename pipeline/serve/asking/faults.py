"""What is wrong with a value, in the words of whoever has sent it."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_NO_OBJECT = ("dict_type", "model_type")


def first_fault(error: ValidationError, value: Any) -> tuple[str, str]:
    """Where in the value, with dots, and what.

    Of a union every member has its fault at the same place: the one that got furthest is told.
    """
    faults = error.errors(include_url=False, include_input=False)
    paths = [_path(fault, value) for fault in faults]
    first = paths[0]
    here = [index for index, path in enumerate(paths) if path[: len(first)] == first]
    furthest = max(here, key=lambda index: len(paths[index]))
    return ".".join(paths[furthest]), _what(faults[furthest])


def _path(fault: ErrorDetails, value: Any) -> list[str]:
    """Without what pydantic calls a union's members, which stands between names."""
    path = []
    for name in fault["loc"]:
        if _holds(value, name):
            value = value[name]
        elif fault["type"] != "missing" or name != fault["loc"][-1]:
            continue
        path.append(str(name))
    return path


def _holds(value: Any, name: str | int) -> bool:
    if isinstance(value, Mapping):
        return name in value
    return isinstance(value, list) and isinstance(name, int) and name < len(value)


def _what(fault: ErrorDetails) -> str:
    if fault["type"] in _NO_OBJECT:
        return "Input should be an object"
    return fault["msg"].removeprefix("Value error, ")
