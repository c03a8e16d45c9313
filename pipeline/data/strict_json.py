"""JSON as the standard has it, and only what a tokenizer can encode."""

import json
import math
from typing import Any

from pipeline.errors import DataError

MAX_DEPTH = 100
"""More than people nest; far less than what stops the template, or a message between processes."""
HALF_CHARACTERS = ("\\ud", "\\uD")
"""A half character can only come from an escape that begins like this: UTF-8 has none."""


def parse_json(text: str) -> Any:
    """The value of a JSON text; raises DataError saying what is wrong with it.

    Unlike json.loads it refuses NaN, Infinity, numbers as large as that, half characters and deep
    nesting.
    """
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        place = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"not JSON: {explain_json(error)}{place}") from error
    check_value(value, text)
    return value


def check_value(value: Any, text: str) -> None:
    """Raise DataError if a value read from a text holds half a character or nests too deeply."""
    if any(half in text for half in HALF_CHARACTERS):
        _refuse_half_characters(value)
    is_container = isinstance(value, dict | list)
    if is_container and text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise DataError(f"nested more than {MAX_DEPTH} levels deep")


def _is_deep(value: dict[str, Any] | list[Any]) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        values = (item.values() if isinstance(item, dict) else item for item in level)
        level = [inner for some in values for inner in some if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def explain_json(error: ValueError | RecursionError) -> str:
    """What a decoder has found, in half a sentence."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _refuse_half_characters(value: Any) -> None:
    """Raise DataError if a text of a JSON-like value holds one half of a character alone."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{half} is half a character; a text was cut there") from error
    except RecursionError as error:
        raise DataError(f"not JSON: {explain_json(error)}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in it")


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_parse_float)
