"""Grammars: whatever they let through is valid, compact and readable; the rest is refused."""

import json
import random
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer

from pipeline.chat import CALL, END_CALL, parse_call
from pipeline.errors import RequestError
from pipeline.serve.asking.grammar import (
    Function,
    Grammar,
    Tags,
    custom,
    either,
    json_object,
    json_schema,
    tool_calls,
)

BYTES = LLTokenizer("byte")
TAGS = Tags(257, 258)  # special tokens of that tokenizer
MAX_STEPS = 600


def walk(grammar: Grammar, seed: int) -> list[int]:
    """A random continuation that the grammar accepts, as bytes and tags; short rather than long."""
    rng, ids = random.Random(seed), list[int]()
    matcher = LLMatcher(BYTES, grammar.text, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    while not matcher.is_stopped() and not (matcher.is_accepting() and rng.random() < 0.5):
        assume(len(ids) < MAX_STEPS)
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [i for i in range(TAGS.end_call + 1) if mask >> i & 1]
        closing = [i for i in allowed if chr(i) in '"}]' or i >= TAGS.call]
        ids.append(rng.choice(closing if closing and rng.random() < 0.4 else allowed))
        assert matcher.consume_token(ids[-1])
    assert not matcher.is_error(), matcher.get_error()
    return ids


def text_of(ids: list[int]) -> str:
    tags = {TAGS.call: CALL.encode(), TAGS.end_call: END_CALL.encode()}
    return b"".join(tags.get(i) or bytes([i]) for i in ids).decode()


def accepts(grammar: Grammar, text: str) -> bool:
    ids: list[int] = []
    for piece in re.split(f"({CALL}|{END_CALL})", text):
        ids += {CALL: [TAGS.call], END_CALL: [TAGS.end_call]}.get(piece, list(piece.encode()))
    matcher = LLMatcher(BYTES, grammar.text, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def check_compact(text: str) -> None:
    """As json.dumps separates."""
    outside = re.sub(r'"(\\.|[^"\\])*"', "", text)
    assert not re.search(r"\s", re.sub(r"[,:] ", "", outside)), text
    assert not re.search(r"[,:](?! )", outside), text


NAMES = st.sampled_from(["a", "city", "naïve", 'qu"ote', "minimum", "back\\slash"])
LEAVES = st.one_of(
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
    st.builds(lambda v: {"enum": v}, st.lists(st.text(max_size=3), min_size=1, max_size=3)),
    st.builds(lambda v: {"const": v}, st.sampled_from([1, None, "é", {"x": [1, "y"]}])),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-50, 50),
        st.integers(0, 200),
    ),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[a-c]{2,3}$"},
            {"type": "string", "format": "date"},
            {"type": ["boolean", "null"]},
            {"type": "number", "minimum": 0},
        ]
    ),
)


def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], num_required: int) -> dict[str, Any]:
        required = list(properties)[:num_required]
        shape = {"type": "object", "properties": properties, "required": required}
        return {**shape, "additionalProperties": False}

    return st.builds(build, st.dictionaries(NAMES, inner, max_size=3), st.integers(0, 3))


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.builds(lambda i, n: {"type": "array", "items": i, "maxItems": n}, inner, LENGTHS)
    unions = st.builds(lambda several: {"anyOf": several}, st.lists(inner, min_size=1, max_size=2))
    return objects(inner) | arrays | unions


LENGTHS = st.integers(0, 3)
SCHEMAS = st.recursive(LEAVES, nested, max_leaves=6)


@given(SCHEMAS, st.integers())
@settings(max_examples=200)
def test_what_a_schemas_grammar_accepts_is_valid_and_compact(
    schema: dict[str, Any], seed: int
) -> None:
    text = text_of(walk(json_schema(schema, "here"), seed))
    Draft202012Validator(schema).validate(json.loads(text))
    check_compact(text)


@given(st.integers())
def test_any_object_is_an_object_and_compact(seed: int) -> None:
    text = text_of(walk(json_object(), seed))
    assert isinstance(json.loads(text), dict)
    check_compact(text)


@given(st.dictionaries(NAMES, objects(SCHEMAS), min_size=1, max_size=2), st.integers())
@settings(max_examples=200)
def test_every_call_is_one_and_its_arguments_are_valid(
    schemas: dict[str, dict[str, Any]], seed: int
) -> None:
    functions = [Function(name, schema, "here") for name, schema in schemas.items()]
    text = CALL + text_of(walk(tool_calls(functions, TAGS, parallel=True), seed))
    for inner in re.fullmatch(f"(?s){CALL}\n(.*)\n{END_CALL}", text)[1].split(  # type: ignore[index]
        f"\n{END_CALL}\n{CALL}\n"
    ):
        call = parse_call(inner)
        assert call is not None, inner
        Draft202012Validator(schemas[call.name]).validate(json.loads(call.arguments))
        check_compact(inner)


WEATHER = Function(
    "get_weather",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "tools[0].function.parameters",
)
NOW = Function("now", None, "tools[1].function.parameters")
PARIS = '\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
EMPTY = '\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "alone", "several"),
    [
        (PARIS, True, True),
        (EMPTY, True, True),
        (f"{PARIS}\n{CALL}{EMPTY}", False, True),
        (f"{PARIS}\n{CALL}{EMPTY}\n{CALL}{PARIS}", False, True),
        (f"{PARIS}{CALL}{EMPTY}", False, False),
        (f"{PARIS}\n", False, False),
        (PARIS.replace('": {', '":  {'), False, False),
        (PARIS.replace('"Paris"', '"Paris", "extra": 1'), False, False),
        (PARIS.replace('{"city": "Paris"}', "{}"), False, False),
        (EMPTY.replace("{}", '{"x": 1}'), False, False),
        (EMPTY.replace("now", "later"), False, False),
        ("", False, False),
    ],
)
def test_calls_are_spelled_as_the_model_has_learnt_them(
    text: str, alone: bool, several: bool
) -> None:
    for parallel, wanted in ((False, alone), (True, several)):
        assert accepts(tool_calls([WEATHER, NOW], TAGS, parallel=parallel), text) is wanted


def test_an_answer_of_the_form_or_calls_may_come_but_nothing_else() -> None:
    answers = json_schema({"type": "object", "properties": {"a": {"type": "integer"}}}, "here")
    grammar = either(answers, tool_calls([NOW], TAGS, parallel=True), TAGS)
    for text in ('{"a": 1}', f"{CALL}{EMPTY}", f"{CALL}{EMPTY}\n{CALL}{EMPTY}"):
        assert accepts(grammar, text), text
    for text in ('{"a": "x"}', EMPTY, f'{{"a": 1}}{CALL}{EMPTY}', "Hello"):
        assert not accepts(grammar, text), text
    own = either(custom('root ::= "yes" | "no"', "here"), tool_calls([NOW], TAGS, parallel=0), TAGS)
    assert accepts(own, "yes")
    assert accepts(own, f"{CALL}{EMPTY}")
    assert not accepts(own, "maybe")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"type": "string", "format": "int64"}, "Unknown format: int64"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex parse error"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"type": "nothing"}, "Invalid type: nothing"),
        ({"properties": [1]}, "properties must be an object"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "greater than maximum"),
        ({"$ref": "https://example.com/schema"}, "retrieving it failed"),
        ({"type": "array", "maxItems": 10**9}, "add up to more than 10,000"),
        ({"x": {"type": "array", "minItems": 10**9}, "$ref": "#/x"}, "more than 10,000"),
        ({"enum": ["x" * 200_000]}, "longer than 100,000 characters"),
        (
            {"type": "object", "properties": {f"p{i}": {} for i in range(2000)}},
            "Current row has .* items",
        ),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_by_name(
    schema: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=said.replace("[", r"\[")) as caught:
        json_schema(schema, "response_format.json_schema.schema")
    assert str(caught.value).startswith("response_format.json_schema.schema ")
    assert "\n" not in str(caught.value)
    assert caught.value.status == 400


def test_a_schema_of_any_depth_is_answered() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"type": "array", "maxItems": 3, "items": schema}
    for ask in (json_schema, lambda s, _: tool_calls([Function("f", s, "")], TAGS, parallel=False)):
        with pytest.raises(RequestError, match="nested more than 100 levels deep"):
            ask(schema, "here")


@pytest.mark.parametrize(
    ("schema", "ignored"),
    [
        ({"type": "array", "uniqueItems": True}, ("uniqueItems",)),
        ({"type": "string", "format": "int64"}, ("format",)),
        ({"type": "string", "pattern": "(?=a)b", "format": "x"}, ("format", "pattern")),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, ("oneOf",)),
        ({"type": "array", "maxItems": 10**9, "minItems": 1}, ("maxItems", "minItems")),
        ({"not": {}, "if": {}, "then": {}}, ("if", "not", "then")),
        ({"enum": ["a"], "description": "x", "x-mine": 1, "default": {"pattern": 1}}, ()),
    ],
)
def test_a_tool_is_taken_and_what_is_not_enforced_is_named(
    schema: dict[str, Any], ignored: tuple[str, ...]
) -> None:
    parameters = {"type": "object", "properties": {"pattern": schema}, "required": ["pattern"]}
    grammar = tool_calls([Function("f", parameters, "here")], TAGS, parallel=False)
    assert grammar.ignored == ignored
    assert not accepts(grammar, '\n{"name": "f", "arguments": {}}\n</tool_call>')


@pytest.mark.parametrize(
    ("parameters", "arguments", "is_taken"),
    [
        (None, "{}", True),
        ({}, '{"x": 1}', False),
        ({"type": "object", "properties": {}}, '{"x": 1}', False),
        ({"type": "object", "additionalProperties": True}, '{"x": 1}', True),
        ({"type": "object", "required": ["x"]}, '{"x": 1}', True),
        ({"properties": {"x": {}}}, '{"x": 1}', True),
        ({"properties": {"x": {}}}, "[1]", False),
        ({"type": ["object", "null"]}, "null", False),
    ],
)
def test_arguments_are_an_object_with_the_declared_properties(
    parameters: Mapping[str, Any] | None, arguments: str, is_taken: bool
) -> None:
    grammar = tool_calls([Function("f", parameters, "here")], TAGS, parallel=False)
    text = f'\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    assert accepts(grammar, text) is is_taken


@pytest.mark.parametrize("parameters", [{"type": "string"}, {"properties": {"a": {"type": "x"}}}])
def test_a_tool_whose_schema_is_none_is_refused_by_name(parameters: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"^tools\[3\]\.function\.parameters"):
        tool_calls(
            [Function("f", parameters, "tools[3].function.parameters")], TAGS, parallel=False
        )


@pytest.mark.parametrize(
    ("text", "taken", "not_taken"),
    [
        ('root ::= "a" digits\ndigits ::= [0-9]{1,3}', "a12", "a1234"),
        ('start: "a" DIGITS\nDIGITS: /[0-9]{1,3}/', "a12", "a1234"),
        ('%llguidance {}\nstart: "a" | "b"', "b", "ab"),
    ],
)
def test_a_clients_grammar_may_be_gbnf_or_lark(text: str, taken: str, not_taken: str) -> None:
    grammar = custom(text, "here")
    assert grammar.text.startswith("start:")
    assert accepts(grammar, taken)
    assert not accepts(grammar, not_taken)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "neither GBNF nor Lark"),
        ("hello", "neither GBNF nor Lark"),
        (f"root ::= {'(' * 3000}", "neither GBNF nor Lark"),
        ('start: "a', "cannot|can be used: 1.10.: lexer error"),
        ("start: x", 'unknown name: "x"'),
        ("start: <[3]>", "it names single tokens"),
        ("start: <|system|>", "it names single tokens"),
        ("start: <think>", 'unknown special token: "<think>"$'),
        ('start: %json {"maxItems": 1000000000}', "json_schema"),
        ("a" * 20_001, "longer than 20,000"),
    ],
)
def test_a_clients_grammar_that_is_none_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        custom(text, "response_format.grammar")
    assert str(caught.value).startswith("response_format.grammar ")
    assert "\n" not in str(caught.value)
