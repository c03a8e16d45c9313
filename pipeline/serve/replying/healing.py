"""Answers that should be JSON and are not quite, repaired."""

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from json_repair import repair_json

_FENCE = re.compile(r"^[ \t]*```\w*\s*(?=[{\[])", re.M)
# Brackets of prose, as in [sic], begin no value.
_BRACKET = re.compile(r"\{|\[(?=\s*(?:[{\[\]\"'\d-]|true\b|false\b|null\b))")


def heal(text: str) -> str | None:
    """The object or array that a text was meant to be; None if it is JSON or beyond repair.

    Of several in prose it is the longest; one that is whole comes back as it is written.
    """
    if _is_json(text):
        return None
    fence = _FENCE.search(text)
    return max(_values(text, fence.end() if fence else 0), key=len, default=None)


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _values(text: str, place: int) -> Iterator[str]:
    """Those that are whole, up to the first that is not: where that ends nobody knows."""
    while bracket := _BRACKET.search(text, place):
        begin = bracket.start()
        try:
            _, place = _DECODER.raw_decode(text, begin)
        except (ValueError, RecursionError):
            repaired = _repaired(text[begin:])
            if repaired is not None:
                yield repaired
            return
        yield text[begin:place]


def _repaired(text: str) -> str | None:
    try:
        value: Any = repair_json(text, return_objects=True, skip_json_loads=True)
        if isinstance(value, list) and text.startswith("{"):  # it has found more after the first
            value = next((part for part in value if isinstance(part, dict)), None)
        if not isinstance(value, (dict, list)):
            return None
        healed = json.dumps(value, ensure_ascii=False, allow_nan=False)
        healed.encode()  # half a surrogate pair is no text that can be sent
    except (ValueError, RecursionError):
        return None
    return healed
