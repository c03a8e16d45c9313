"""A model's reply taken apart: reasoning, answer and tool calls, whole or as it streams."""

import json
import re
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from pipeline.chat.message import Mode

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
TAGS = (THINK, END_THINK, CALL, END_CALL)
_LONGEST_TAG = max(map(len, TAGS))
EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    f"thinking directly now.\n{END_THINK}\n\n"
)
"""What ends a thought that has used up its budget; Qwen's own text (Qwen3 report, 4.3)."""
Channel = Literal["reasoning", "answer", "call"]


@dataclass(frozen=True)
class Piece:
    """A bit of a reply: text of one channel. A call comes whole, as its JSON object's text."""

    channel: Channel
    text: str


class Splitter:
    """Cut a reply's text into reasoning, answer and calls, however the text is chunked.

    Tags never appear in a piece: what may be the beginning of one is held back. The template's own
    line breaks around the blocks are taken off, so pieces join to what the template was given.
    A call in a thought is none: its text stays part of the thought.
    """

    def __init__(self, mode: Mode, *, is_begun: bool = False, may_call: bool = True) -> None:
        """`is_begun` is a reply whose answer's beginning was given, and goes on from there.

        Without `may_call` there is nothing to call: what looks like a call is answer, and only its
        tags go.
        """
        self._channel: Channel = "answer"
        self._may_think = mode == "thinking"
        self._may_call = may_call
        self._buffer = ""
        self._at_start = not is_begun

    def feed(self, text: str) -> list[Piece]:
        """Take the next text of the reply, give what is certain."""
        self._buffer += text
        pieces: list[Piece] = []
        while (found := self._next_tag()) is not None:
            before, tag = found
            if self._channel == "reasoning" and tag != END_THINK:
                self._emit(pieces, before)
                continue
            self._emit(pieces, before.rstrip("\n"))
            self._switch(tag)
        if self._channel != "call":
            keep = _held_back(self._buffer)
            certain, self._buffer = (
                self._buffer[: len(self._buffer) - keep],
                self._buffer[len(self._buffer) - keep :],
            )
            self._emit(pieces, certain)
        return pieces

    def finish(self) -> list[Piece]:
        """The reply has ended: give what was held back."""
        rest, self._buffer = self._buffer, ""
        pieces: list[Piece] = []
        # An unfinished call is no call; its text would be half a JSON object to the client.
        if self._channel != "call":
            self._emit(pieces, rest)
        return pieces

    def _next_tag(self) -> tuple[str, str] | None:
        if "<" not in self._buffer:  # asked for every token, and few have a tag
            return None
        wanted = (END_CALL,) if self._channel == "call" else TAGS
        places = [(self._buffer.find(tag), tag) for tag in wanted if tag in self._buffer]
        if not places:
            return None
        place, tag = min(places)
        before = self._buffer[:place]
        self._buffer = self._buffer[place + len(tag) :]
        return before, tag

    def _switch(self, tag: str) -> None:
        if tag == THINK:
            self._channel = "reasoning" if self._may_think else "answer"
        elif tag == CALL:
            self._channel = "call" if self._may_call else "answer"
        else:
            self._channel = "answer"
            self._may_think = self._may_think and tag != END_THINK
        self._at_start = True

    def _emit(self, pieces: list[Piece], text: str) -> None:
        if self._at_start:
            text = text.lstrip("\n")
        if text:
            self._at_start = False
            pieces.append(Piece(self._channel, text))


def _held_back(buffer: str) -> int:
    """How many last characters may be line breaks before a tag, or the beginning of a tag."""
    # Asked for every token, too.
    tag_part = _tag_part(buffer) if "<" in buffer else 0
    before = buffer[: len(buffer) - tag_part]
    return tag_part + len(before) - len(before.rstrip("\n"))


def _tag_part(buffer: str) -> int:
    """How many last characters may be the beginning of a tag."""
    return max(
        (size for tag in TAGS for size in range(1, len(tag)) if buffer.endswith(tag[:size])),
        default=0,
    )


def without_tags(text: str) -> str:
    """A call that is none, as text: its tags go, and what they would leave as tags, too."""
    while any(tag in text for tag in TAGS):
        for tag in TAGS:
            text = text.replace(tag, "")
    return text


class Untagged:
    """Text of one channel as its reader joins it: bits from both sides of a tag could be a tag.

    Such a tag loses its end, character by character, so that chunks change nothing.
    """

    def __init__(self) -> None:
        self._tail = ""

    def feed(self, text: str) -> str:
        """Take the next bit, give what of it may be told."""
        joined = self._tail + text
        while "<" in joined and any(tag in joined for tag in TAGS):
            for tag in TAGS:
                joined = joined.replace(tag, tag[:-1])
        told = joined[len(self._tail) :]
        self._tail = joined[-_LONGEST_TAG:]
        return told


@dataclass(frozen=True)
class ToolCall:
    """One call the model asks for; `arguments` is a JSON object's text."""

    name: str
    arguments: str


def parse_call(text: str) -> ToolCall | None:
    """A call from the text between its tags; None where it is not a call.

    Half of a surrogate pair, which no UTF-8 has, becomes the character for what is not one.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return ToolCall(_paired(value["name"]), _paired(json.dumps(arguments, ensure_ascii=False)))


def _paired(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


@dataclass(frozen=True)
class Reply:
    """A whole reply of the model, taken apart."""

    reasoning: str = ""
    answer: str = ""
    calls: tuple[ToolCall, ...] = field(default=())


def parse_reply(text: str, mode: Mode) -> Reply:
    """Take a whole reply apart; the same cuts as the Splitter makes in a stream."""
    splitter = Splitter(mode)
    pieces = splitter.feed(text) + splitter.finish()
    calls = [parse_call(piece.text) for piece in pieces if piece.channel == "call"]
    return Reply(
        "".join(piece.text for piece in pieces if piece.channel == "reasoning"),
        "".join(piece.text for piece in pieces if piece.channel == "answer"),
        tuple(call for call in calls if call is not None),
    )


_THINKING_FORM = re.compile(r"<think>\n(?!\n)(.+?)\n</think>\n\n(?=\S)", re.S)


def is_well_formed(text: str, mode: Mode) -> bool:
    """Whether a reply has its mode's form, without <|im_end|>.

    Thinking: one think block with something in it, then text or a call. Direct: something, and no
    think tag. Either way every call is closed and is a call.
    """
    if mode == "thinking":
        block = _THINKING_FORM.match(text)
        if block is None:
            return False
        text = text[block.end() :]
        if THINK in block[1] or CALL in block[1]:
            return False
    if not text.strip() or THINK in text or END_THINK in text:
        return False
    outside = re.sub(f"{CALL}(.*?){END_CALL}", _blank_if_call, text, flags=re.S)
    return CALL not in outside and END_CALL not in outside


def _blank_if_call(match: re.Match[str]) -> str:
    return "" if parse_call(match[1]) else match[0]
