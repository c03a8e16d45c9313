"""Damaged JSON and what becomes of it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.serve.replying.healing import heal

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
PERSON = {"name": "Ada", "tags": ["a", "b"], "age": 36}


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ada", "tags": ["a", "b"], "age": 36',
        '{"name": "Ada", "tags": ["a", "b", "age": 36}',
        '{"name": "Ada", "tags": ["a", "b"], "age": 36}}',
        '{"name": "Ada", "tags": ["a", "b",], "age": 36,}',
        '```json\n{"name": "Ada", "tags": ["a", "b"], "age": 36}\n```',
        '```\n{"name": "Ada", "tags": ["a", "b"], "age": 36,}\n```',
        'The set {x}, then:\n```json\n{"name": "Ada", "tags": ["a", "b"], "age": 36}\n```\nFine?',
        'Sure! Here it is: {"name": "Ada", "tags": ["a", "b"], "age": 36} I hope that helps.',
        'As [1] says [sic], {"name": "Ada", "tags": ["a", "b"], "age": 36,} is she.',
        '{name: "Ada", tags: ["a", "b"], age: 36}',
        "{'name': 'Ada', 'tags': ['a', 'b'], 'age': 36}",
        '{"name": "Ada" "tags": ["a" "b"] "age": 36}',
    ],
    ids=[
        "a bracket missing at the end",
        "a bracket missing inside",
        "a bracket too many",
        "trailing commas",
        "a fence",
        "a fence and a comma",
        "prose with braces before a fence",
        "prose around it",
        "brackets in prose",
        "bare keys",
        "single quotes",
        "no commas",
    ],
)
def test_what_was_meant_is_found(text: str) -> None:
    healed = heal(text)

    assert healed is not None
    assert json.loads(healed) == PERSON


@pytest.mark.parametrize(
    "text",
    ["", "no", "It is 36.", "{" * 5000, '{"a": "\\ud800",}', '{"a": 1e400,}', "{]1", "[sic]"],
)
def test_what_is_no_json_at_all_stays_as_it_is(text: str) -> None:
    assert heal(text) is None


def test_a_value_that_is_whole_keeps_its_spelling() -> None:
    assert heal('So: {"price": 0.1000,  "n": 12345678901234567890}.') == (
        '{"price": 0.1000,  "n": 12345678901234567890}'
    )


def test_a_list_of_damaged_objects_stays_a_list() -> None:
    healed = heal('Both: [{"a": 1,}, {"a": 2,}')

    assert healed is not None
    assert json.loads(healed) == [{"a": 1}, {"a": 2}]


def test_of_two_damaged_objects_there_is_the_first_and_no_list_of_both() -> None:
    healed = heal('{"a": 1,} or {"b": [2],}')

    assert healed is not None
    assert json.loads(healed) == {"a": 1}


@given(VALUES, st.sampled_from([None, 2]), st.booleans())
def test_json_is_not_touched(value: Any, indent: int | None, ascii_only: bool) -> None:
    assert heal(json.dumps(value, indent=indent, ensure_ascii=ascii_only)) is None


@given(st.dictionaries(st.text(), VALUES, min_size=1), st.text(), st.text(), st.data())
def test_what_is_healed_is_json_that_can_be_sent(
    value: Any, before: str, after: str, data: st.DataObject
) -> None:
    text = before + json.dumps(value, ensure_ascii=False) + after
    place = data.draw(st.integers(0, len(text) - 1))
    text = data.draw(st.sampled_from([text, text[:place], text[:place] + text[place + 1 :]]))

    healed = heal(text)

    if healed is not None:
        assert isinstance(json.loads(healed.encode()), (dict, list))
        assert heal(healed) is None


@given(st.text(alphabet="{}[]\",:'`\\ \na1-.eE/#*tfnN"))
def test_any_rubbish_is_healed_to_json_or_left_alone(text: str) -> None:
    healed = heal(text)

    if healed is not None:
        json.loads(healed.encode(), parse_constant=pytest.fail)
