"""A reply of a server elsewhere: its chunks in, events out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from pipeline.chat import ToolCall
from pipeline.errors import EngineError
from pipeline.serve.offer.price import PICODOLLARS
from pipeline.serve.replying.choices import Indexed
from pipeline.serve.replying.events import Called, Ended, Event, Said, Tally, Usage

Chunk = Mapping[str, Any]
_FINISHES: dict[str, Literal["stop", "length", "content_filter"]] = {
    "length": "length",
    "content_filter": "content_filter",
}
_MAX_COUNT = 2**31
_MAX_PICODOLLARS = 2**62
_MAX_WORD = 64


class UpstreamReply:
    """All choices of a reply, understood so far. `end` comes once there are no more chunks.

    A choice's end is told last of all, as what it has used is known only then. That of all choices
    together is in the first tally.
    """

    def __init__(self, name: str, tallies: Sequence[Tally], *, tells_cost: bool) -> None:
        """`name` is what failures call the server; its word on the cost may not be asked for."""
        self._name = name
        self._tally = tallies[0]
        self._tells_cost = tells_cost
        self._choices = [_Choice(name) for _ in tallies]

    def read(self, chunk: Chunk) -> Iterator[Indexed]:
        """Take a chunk that is no error; EngineError for one that cannot be understood."""
        self._count(chunk.get("usage"))
        for choice in _objects(chunk.get("choices")):
            index = choice.get("index", 0)
            if index in range(len(self._choices)):
                for event in self._choices[index].read(choice):
                    yield index, event

    def end(self) -> Iterator[Indexed]:
        """EngineError if a choice was broken off."""
        for index, choice in enumerate(self._choices):
            if choice.ended is None:
                raise EngineError(f"{self._name} ended its answer too early")
            yield index, choice.ended

    def _count(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        num_prompt = _count(usage.get("prompt_tokens"))
        num_completion = _count(usage.get("completion_tokens"))
        reasoning = _object(usage.get("completion_tokens_details")).get("reasoning_tokens")
        cached = _object(usage.get("prompt_tokens_details")).get("cached_tokens")
        self._tally.usage = Usage(
            num_prompt,
            num_completion,
            min(_count(reasoning), num_completion),
            min(_count(cached), num_prompt),
        )
        if self._tells_cost:
            self._tally.cost_picodollars = _picodollars(usage.get("cost"))


class _Choice:
    """`ended` is set once it has said why it ends; whatever comes then is no part of it."""

    def __init__(self, name: str) -> None:
        self.ended: Ended | None = None
        self._name = name
        self._calls: dict[int, tuple[str, str]] = {}

    def read(self, choice: Chunk) -> Iterator[Event]:
        if self.ended is not None:
            return
        delta = _object(choice.get("delta"))
        if reasoning := _reasoning(delta):
            yield Said("reasoning", reasoning)
        if answer := _text(delta.get("content")) or _text(choice.get("text")):
            yield Said("answer", answer)
        for call in _objects(delta.get("tool_calls")):
            self._add(call)
        if finish := _text(choice.get("finish_reason")):
            yield from self._end(finish, _text(choice.get("native_finish_reason")) or finish)

    def _add(self, call: Chunk) -> None:
        """A part of a call: the first has its name, the others more of its arguments."""
        # Without numbers a new id is a new call.
        number = len(self._calls) - (not call.get("id"))
        index = _count(call.get("index", number))
        function = _object(call.get("function"))
        name, arguments = self._calls.get(index, ("", ""))
        name = name or _text(function.get("name"))
        self._calls[index] = (name, arguments + _text(function.get("arguments")))

    def _end(self, finish: str, native_finish: str) -> Iterator[Event]:
        if finish == "error":
            raise EngineError(f"{self._name} broke its answer off")
        calls = [self._calls[index] for index in sorted(self._calls)]
        if finish == "length" and calls and not _is_object(calls[-1][1]):
            calls.pop()  # it was cut off, and is none
        for index, (name, arguments) in enumerate(calls):
            if not name or not _is_object(arguments or "{}"):
                raise EngineError(f"{self._name} called a tool with arguments that are no JSON")
            yield Called(index, ToolCall(name, arguments or "{}"))
        named = "tool_calls" if calls else _FINISHES.get(finish, "stop")
        self.ended = Ended(named, native_finish[:_MAX_WORD])


def _reasoning(delta: Chunk) -> str:
    """The same text, in whichever of its fields it stands."""
    text = _text(delta.get("reasoning")) or _text(delta.get("reasoning_content"))
    if text:
        return text
    details = _objects(delta.get("reasoning_details"))
    return "".join(_text(item.get("text")) or _text(item.get("summary")) for item in details)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _object(value: Any) -> Chunk:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[Chunk]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _count(value: Any) -> int:
    """0 for what counts nothing."""
    return value if type(value) is int and 0 <= value < _MAX_COUNT else 0


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _picodollars(cost: Any) -> int | None:
    """None where it says nothing of it."""
    if type(cost) not in (int, float):
        return None
    try:
        # As it is written: a float times a power of ten would be another number.
        amount = Decimal(str(cost)) * PICODOLLARS
    except InvalidOperation:
        return None
    return round(amount) if 0 <= amount < _MAX_PICODOLLARS else None
