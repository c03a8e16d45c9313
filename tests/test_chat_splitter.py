"""The Splitter: one text, one parse, however it comes in."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.chat import (
    CALL,
    END_CALL,
    Mode,
    Piece,
    Splitter,
    Untagged,
    is_well_formed,
    parse_call,
    parse_reply,
)

BITS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "\n", "a", "<", "<th", ">", '{"b":1}']
texts = st.lists(st.sampled_from(BITS), max_size=14).map("".join)
modes = st.sampled_from(["thinking", "direct"])


def split(chunks: list[str], mode: Mode) -> list[Piece]:
    """Neighbouring pieces of one channel joined; calls stay apart."""
    splitter = Splitter(mode)
    pieces = [piece for chunk in chunks for piece in splitter.feed(chunk)] + splitter.finish()
    joined: list[Piece] = []
    for piece in pieces:
        if joined and piece.channel != "call" and joined[-1].channel == piece.channel:
            joined[-1] = Piece(piece.channel, joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined


@given(texts, modes, st.data())
def test_chunk_boundaries_change_nothing(text: str, mode: Mode, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    edges = [0, *cuts, len(text)]
    chunks = [text[a:b] for a, b in pairwise(edges)]

    assert split(chunks, mode) == split([text], mode)


@given(texts, modes)
def test_no_tag_is_ever_in_reasoning_or_answer(text: str, mode: Mode) -> None:
    for piece in split(list(text), mode):
        if piece.channel != "call":
            assert not any(tag in piece.text for tag in BITS[:4])


@given(st.lists(st.sampled_from([*BITS, "ink>", "</thi", "nk>"]), max_size=10), st.data())
def test_bits_from_both_sides_of_a_tag_make_no_tag(bits: list[str], data: st.DataObject) -> None:
    text = "".join(bits)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    one, many = Untagged(), Untagged()

    told = "".join(many.feed(text[a:b]) for a, b in pairwise([0, *cuts, len(text)]))

    assert told == one.feed(text)
    assert not any(tag in told for tag in BITS[:4])


def test_where_nothing_can_be_called_a_call_is_answer() -> None:
    splitter = Splitter("direct", may_call=False)

    pieces = splitter.feed('{"a": "<tool_call>b"}') + splitter.finish()

    assert {piece.channel for piece in pieces} == {"answer"}
    assert "".join(piece.text for piece in pieces) == '{"a": "b"}'


def test_a_reply_comes_apart_into_reasoning_answer_and_calls() -> None:
    text = (
        '<think>\nhm\n</think>\n\nLook:\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    )

    reply = parse_reply(text, "thinking")

    assert (reply.reasoning, reply.answer) == ("hm", "Look:")
    assert [(call.name, call.arguments) for call in reply.calls] == [("f", "{}")]


def test_reasoning_in_direct_mode_is_answer() -> None:
    assert parse_reply("<think>\nhm\n</think>\n\nyes", "direct").reasoning == ""


def test_a_call_nested_too_deeply_is_none() -> None:
    assert parse_call('{"name": "f", "arguments": ' + "[" * 5000) is None
    assert not is_well_formed(f"{CALL}{'[' * 5000}{END_CALL}", "direct")


@pytest.mark.parametrize(
    ("escaped", "told"),
    [(r"\ud800", "�"), (r"a\udc00b", "a�b"), (r"\ud83d\ude00", "😀")],
)
def test_a_call_is_text_that_can_be_sent_whatever_is_escaped_in_it(escaped: str, told: str) -> None:
    call = parse_call(f'{{"name": "f{escaped}", "arguments": {{"a": "{escaped}"}}}}')
    assert call is not None
    assert (call.name, json.loads(call.arguments)) == (f"f{told}", {"a": told})
    call.arguments.encode()


def test_a_number_that_json_has_not_makes_no_call() -> None:
    assert parse_call('{"name": "f", "arguments": {"a": NaN}}') is None
