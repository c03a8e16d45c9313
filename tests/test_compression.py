"""Conversations that are too long, made to fit."""

import json
import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.serve.asking.compression import CUT, MIN_CHARACTERS, compress

Messages = list[dict[str, Any]]


class Room:
    """Fits what is no longer, as JSON; counts how often it was asked."""

    def __init__(self, num_characters: int) -> None:
        self.num_characters = num_characters
        self.num_asked = 0

    def __call__(self, messages: Messages) -> bool:
        self.num_asked += 1
        return size(messages) <= self.num_characters


def size(messages: Messages) -> int:
    return len(json.dumps(messages, ensure_ascii=False))


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def calling(*ids: str) -> dict[str, Any]:
    calls = [{"id": name, "type": "function", "function": {"name": "f"}} for name in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(name: str, text: str = "done") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": name, "content": text}


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    """Well-formed: system messages anywhere, calls with all their results, a user at some place."""
    messages: Messages = []
    texts = st.text(alphabet="ab ü…", max_size=40) | st.integers(0, 4000).map(lambda n: "x" * n)
    kinds = draw(st.lists(st.sampled_from(["system", "user", "assistant", "call"]), max_size=25))
    for kind in [*kinds, draw(st.sampled_from(["user", "call", "assistant"]))]:
        if kind != "call":
            text: Any = draw(texts)
            if draw(st.booleans()):
                text = [{"type": "text", "text": text}, {"type": "text", "text": draw(texts)}]
            messages.append(said(kind, text))
            continue
        ids = [f"call_{len(messages)}_{number}" for number in range(draw(st.integers(1, 3)))]
        messages += [calling(*ids), *(result(name, draw(texts)) for name in ids)]
    return messages


def uncut(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "content"}


def is_subsequence(part: Messages, whole: Messages) -> bool:
    rest = iter(whole)
    return all(any(uncut(message) == uncut(other) for other in rest) for message in part)


@given(conversations(), st.floats(0, 1.2))
def test_what_comes_back_fits_in_order_with_both_ends_and_every_call_with_its_results(
    messages: Messages, share: float
) -> None:
    room = Room(round(size(messages) * share))

    fitting = compress(messages, room)

    if size(messages) <= room.num_characters:
        assert fitting == messages
        return
    assume(fitting is not None)
    assert fitting is not None
    assert room(fitting)
    assert is_subsequence(fitting, messages)
    assert uncut(fitting[-1]) == uncut(messages[-1])
    others = [message for message in messages if message["role"] != "system"]
    assert next(uncut(m) for m in fitting if m["role"] != "system") == uncut(others[0])
    assert [m for m in fitting if m["role"] == "system"] == [
        m for m in messages if m["role"] == "system"
    ]
    assert sum(m["role"] == "user" for m in fitting) >= min(
        1, sum(m["role"] == "user" for m in messages)
    )
    called = [call["id"] for m in fitting for call in m.get("tool_calls", ())]
    assert called == [m["tool_call_id"] for m in fitting if m["role"] == "tool"]


@given(conversations(), st.floats(0, 1))
def test_few_attempts_find_it(messages: Messages, share: float) -> None:
    room = Room(round(size(messages) * share))

    compress(messages, room)

    longest = 4000 / MIN_CHARACTERS
    assert room.num_asked <= 3 + math.log2(len(messages) + 1) + math.log2(longest) + 7


def test_a_long_conversation_takes_a_dozen_attempts() -> None:
    messages = [said("user", f"question {n}") for n in range(4000)]
    room = Room(size(messages) // 3)

    fitting = compress(messages, room)

    assert fitting is not None
    assert room.num_asked <= 15


def test_the_middle_goes_and_no_more_of_it_than_must() -> None:
    messages = [said("user" if n % 2 == 0 else "assistant", str(n)) for n in range(9)]

    for num_left_out in range(1, 8):
        allowed = len(messages) - num_left_out
        fitting = compress(messages, lambda some, most=allowed: len(some) <= most)
        assert fitting is not None
        numbers = [int(message["content"]) for message in fitting]
        gone = sorted(set(range(9)) - set(numbers))
        assert len(gone) == num_left_out
        assert gone == list(range(gone[0], gone[-1] + 1))
        assert abs((gone[0] + gone[-1]) / 2 - 4) <= 0.5


def test_the_last_of_the_user_stays_before_however_many_calls() -> None:
    calls = [message for n in range(9) for message in (calling(f"c{n}"), result(f"c{n}"))]
    messages = [said("user", "hello"), said("assistant", "hi"), said("user", "look it up"), *calls]

    fitting = compress(messages, lambda some: len(some) <= 4)

    assert fitting == [messages[0], messages[2], *messages[-2:]]


def test_results_go_with_the_call_they_name_wherever_they_stand() -> None:
    begin, end = said("user", "begin"), said("user", "end")
    calls = [calling("a"), calling("b")]
    messages = [begin, *calls, result("a"), end, result("b")]

    fitting = compress(messages, lambda some: len(some) <= 4)

    assert fitting == [begin, calls[1], end, result("b")]


def test_a_result_without_any_call_may_be_there() -> None:
    messages = [result("a"), result("b"), said("user", "end")]

    assert compress(messages, lambda some: len(some) <= 2) == [messages[0], messages[2]]


def test_a_question_that_is_too_long_alone_loses_its_middle() -> None:
    messages = [said("system", "s" * 900), said("user", "first " + "x" * 9000 + " last")]
    room = Room(3000)

    fitting = compress(messages, room)

    assert fitting is not None
    system, question = fitting
    assert system == messages[0]
    assert question["content"].startswith("first x")
    assert question["content"].endswith("x last")
    assert CUT in question["content"]
    assert 0.95 * room.num_characters < size(fitting) <= room.num_characters
    assert messages[1]["content"].count("x") == 9000


def test_only_the_longest_texts_are_cut() -> None:
    parts = [{"type": "text", "text": "y" * 8000}, {"type": "text", "text": "short"}]
    messages = [said("user", "z" * 900), {"role": "user", "content": parts}]

    fitting = compress(messages, Room(4000))

    assert fitting is not None
    assert fitting[0] == messages[0]
    assert [part["type"] for part in fitting[1]["content"]] == ["text", "text"]
    assert CUT in fitting[1]["content"][0]["text"]
    assert fitting[1]["content"][1] == parts[1]


@pytest.mark.parametrize("system", ["", "s" * 5000])
def test_nothing_helps_where_what_must_stay_does_not_fit(system: str) -> None:
    messages = [said("system", system), said("user", "x" * 5000)]

    assert compress(messages, Room(100)) is None
