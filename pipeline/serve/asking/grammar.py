"""Shapes a client asks for, as grammars in llguidance's dialect of Lark, checked before use.

llama.cpp answers without any constraint where its llguidance refuses a grammar, so what is not
refused here must be what that very version takes: pyproject.toml pins it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer, grammar_from

from pipeline.chat import CALL, END_CALL, Chat
from pipeline.errors import RequestError
from pipeline.serve.asking.nesting import is_deeper

MAX_SCHEMA_CHARACTERS = 100_000
MAX_GRAMMAR_CHARACTERS = 20_000
MAX_DEPTH = 100
MAX_ITEMS = 10_000
"""Sum of a schema's minItems and maxItems: llguidance makes rules for each item, gigabytes of
them for a maxItems of a thousand million."""
_BYTES = LLTokenizer("byte")
_TRIED_BYTES = 8
# json.dumps' own spelling, which is what models have seen; a weak one would pad with free space.
_SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_BOUNDS = frozenset(
    [
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
        "pattern",
        "multipleOf",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
    ]
)
_DATA = frozenset(["const", "default", "enum", "examples"])
# With one of these beside it, forbidding further properties would say more than the client meant.
_OPEN = frozenset(
    [
        "$ref",
        "additionalProperties",
        "allOf",
        "anyOf",
        "oneOf",
        "patternProperties",
        "unevaluatedProperties",
    ]
)


@dataclass(frozen=True)
class Grammar:
    """What a continuation must match."""

    text: str
    """With `start` as its first rule."""
    ignored: tuple[str, ...] = ()
    """Keywords of the schemas that it does not enforce."""


@dataclass(frozen=True)
class Function:
    """One a model may call."""

    name: str
    parameters: Mapping[str, Any] | None
    """The schema of its arguments; none is a function without any."""
    where: str
    """Where the request has the schema, for messages."""


@dataclass(frozen=True)
class Tags:
    """The ids of the tokens around a call.

    A grammar names them by id: their text matches no token of theirs in vLLM, and their names are
    unknown in llama.cpp.
    """

    call: int
    end_call: int

    @classmethod
    def of(cls, chat: Chat) -> "Tags":
        """Those of a dialogue."""
        return cls(chat.token_id(CALL), chat.token_id(END_CALL))


def json_object() -> Grammar:
    """Any JSON object."""
    return Grammar(f"start: {_rule({'type': 'object'})}\n")


def json_schema(schema: Mapping[str, Any], where: str) -> Grammar:
    """What is valid by a schema; RequestError if some of it cannot be enforced."""
    _refuse_huge(schema, where)
    fault, _ = _check(schema)
    if fault:
        raise RequestError(f"{where} cannot be enforced: {fault}")
    return Grammar(f"start: {_rule(schema)}\n")


def custom(text: str, where: str) -> Grammar:
    """A client's own grammar, GBNF as llama.cpp has it or llguidance's Lark."""
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise RequestError(f"{where} is longer than {MAX_GRAMMAR_CHARACTERS:,} characters")
    if "%json" in text:  # its bounds would be nobody's to check
        raise RequestError(f"{where} has %json: use a response_format of type json_schema for that")
    try:
        lark = grammar_from("grammar", text)
    except ValueError as error:
        raise RequestError(f"{where} is neither GBNF nor Lark: {_first_line(error)}") from error
    lark = re.sub(r"\A\s*%llguidance[^\n]*\n", "", lark).strip() + "\n"
    fault, _ = _try(lark)
    _, warnings = LLMatcher.validate_grammar_with_warnings(lark)
    if fault or warnings:  # without a tokenizer, single tokens are what it warns of
        reason = fault or "it names single tokens"
        raise RequestError(f"{where} is not a grammar that can be used: {reason}")
    return Grammar(lark)


def tool_calls(functions: Sequence[Function], tags: Tags, *, parallel: bool) -> Grammar:
    """What follows an emitted `<tool_call>`: one call, or several; then the turn must end.

    What cannot be enforced of a schema is named; RequestError if nothing of it can.
    """
    alternatives, rules, ignored = [], [], set[str]()
    for index, function in enumerate(functions):
        _refuse_huge(function.parameters, function.where)
        schema, names = _enforceable(_arguments(function), function.where)
        ignored |= names
        head = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": '
        alternatives.append(f"{json.dumps(head)} arguments_{index}")
        rules.append(f"arguments_{index}: {_rule(schema, is_lenient=True)}\n")
    more = f' ("\\n" <[{tags.call}]> "\\n" call)*' if parallel else ""
    lines = [
        f'start: "\\n" call{more}\n',
        f'call: ({" | ".join(alternatives)}) "}}\\n" <[{tags.end_call}]>\n',
    ]
    return Grammar("".join(lines + rules), tuple(sorted(ignored)))


def either(answer: Grammar, calls: Grammar, tags: Tags) -> Grammar:
    """An answer, or `<tool_call>` and what may follow it."""
    parts = {"answer": answer, "calls": calls}
    rules = [f"{name}: %lark {{\n{part.text}}}\n" for name, part in parts.items()]
    ignored = sorted({*answer.ignored, *calls.ignored})
    start = f"start: answer | <[{tags.call}]> calls\n"
    return Grammar(start + "".join(rules), tuple(ignored))


def _rule(schema: Mapping[str, Any], *, is_lenient: bool = False) -> str:
    guidance = {**_SPELLING, "lenient": is_lenient}
    return f"%json {json.dumps({**schema, 'x-guidance': guidance})}"


def _arguments(function: Function) -> dict[str, Any]:
    """A function's schema as that of an object, with no properties but those it declares."""
    schema = dict(function.parameters or {})
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise RequestError(f"{function.where}: type must be object, not {json.dumps(kind)}")
    schema["type"] = "object"
    required, declared = schema.get("required", []), schema.get("properties", {})
    is_sound = isinstance(required, list) and isinstance(declared, Mapping)
    # Required but not declared: somebody counts on further properties.
    if not is_sound or not set(map(str, required)) <= declared.keys() or _OPEN & schema.keys():
        return schema
    return {**schema, "additionalProperties": False}


def _enforceable(schema: dict[str, Any], where: str) -> tuple[dict[str, Any], set[str]]:
    """The part of a schema that can be enforced, and what had to be left out or is ignored."""
    fault, ignored = _check(schema, is_lenient=True)
    dropped = {name for name, _ in _bounds(schema)} if fault else set[str]()
    if fault and dropped:
        schema = _without_bounds(schema)
        fault, ignored = _check(schema, is_lenient=True)
    if fault:
        raise RequestError(f"{where} cannot be used: {fault}")
    return schema, ignored | dropped


def _check(schema: Mapping[str, Any], *, is_lenient: bool = False) -> tuple[str, set[str]]:
    """Why a schema cannot be used, or "", and which keywords are then ignored."""
    items = ("minItems", "maxItems")
    if sum(float(bound) for name, bound in _bounds(schema) if name in items) > MAX_ITEMS:
        return f"its minItems and maxItems add up to more than {MAX_ITEMS:,}", set()
    fault, warnings = _try(f"start: {_rule(schema, is_lenient=is_lenient)}\n")
    return fault, {name for warning in warnings for name in _named(warning)}


def _named(warning: str) -> list[str]:
    """The keywords a warning of llguidance is about."""
    if warning.startswith("Unimplemented keys"):
        return re.findall(r'"([^"]+)"', warning)
    return ["format"] if warning.startswith("Unknown format") else [warning.split()[0]]


def _refuse_huge(schema: Any, where: str) -> None:
    """Refuse what would take long to compile, here or in the engine."""
    if is_deeper(schema, MAX_DEPTH):
        raise RequestError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARACTERS:
        raise RequestError(f"{where} is longer than {MAX_SCHEMA_CHARACTERS:,} characters")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


def _bounds(value: Any) -> Iterator[tuple[str, Any]]:
    """Every bound on numbers, texts and arrays, wherever a reference may reach it."""
    if isinstance(value, Mapping):
        yield from ((name, item) for name, item in value.items() if _is_bound(name, item))
    for child in _children(value):
        yield from _bounds(child)


def _without_bounds(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_bounds(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        name: item if name in _DATA else _without_bounds(item)
        for name, item in value.items()
        if not _is_bound(name, item)
    }


def _is_bound(name: str, value: Any) -> bool:
    """A property of such a name has a schema, which is neither text nor number."""
    return name in _BOUNDS and isinstance(value, str if name == "pattern" else int | float)


@lru_cache(maxsize=256)
def _try(lark: str) -> tuple[str, tuple[str, ...]]:
    """Why llguidance does not take a grammar, or "", and its warnings."""
    matcher = LLMatcher(_BYTES, lark, log_level=0)
    # A grammar too wide for its limits is only noticed when it comes to choosing.
    for _ in range(_TRIED_BYTES):
        if matcher.is_error() or matcher.is_stopped():
            break
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        matcher.consume_token((allowed & -allowed).bit_length() - 1)
    return _first_line(matcher.get_error()), tuple(matcher.get_grammar_warnings())


def _first_line(fault: object) -> str:
    """What llguidance says, without its excerpt of the grammar and its list of tokens."""
    line = str(fault).strip().split("\n")[0].split("; following special tokens")[0]
    return re.sub(r"^.*failed to compile JSON schema: ", "", line)
