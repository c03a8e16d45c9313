"""An order to an engine, and its deltas as what a client is told: pieces, calls, an end."""

import contextlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.chat import END_THINK, Piece, Splitter, ToolCall, parse_call
from pipeline.engine.protocol import Delta, Engine, Finish
from pipeline.errors import EngineError
from pipeline.serve.order import Order


@dataclass(frozen=True)
class Usage:
    """Tokens of one reply. Reasoning is part of the completion, cached part of the prompt."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Said:
    """A bit of reasoning or answer."""

    channel: Literal["reasoning", "answer"]
    text: str


@dataclass(frozen=True)
class Called:
    """One whole tool call; `index` counts from 0."""

    index: int
    call: ToolCall


@dataclass(frozen=True)
class Ended:
    """The last event of a reply."""

    finish: Literal["stop", "length", "tool_calls"]
    native_finish: Finish
    usage: Usage


Event = Said | Called | Ended


async def answer(order: Order, engine: Engine) -> AsyncGenerator[Event, None]:
    """Drive the engine. Closing this generator, or a stop string in the answer, cancels it."""
    reading = _Reading(order)
    async with contextlib.aclosing(engine.generate(order.prompt_ids, order.sampling)) as deltas:
        async for delta in deltas:
            for event in reading.read(delta):
                yield event
            if reading.is_over:
                break
        else:
            raise EngineError("the engine ended its answer without saying why")
    yield reading.end()


class _Reading:
    """What has been understood of one reply so far."""

    def __init__(self, order: Order) -> None:
        self.is_over = False
        self._order = order
        self._splitter = Splitter(order.mode)
        self._stops = StopStrings(order.stops)
        self._meter = _ReasoningMeter()
        self._num_calls = 0
        self._finish: Finish = "stop"
        self._usage = Usage()

    def read(self, delta: Delta) -> Iterator[Event]:
        """Take a delta, give its events; `is_over` once nothing more is wanted."""
        pieces = self._splitter.feed(delta.text)
        if delta.finish is not None:
            pieces += self._splitter.finish()
        self._count(delta, pieces)
        for piece in pieces:
            yield from self._tell(piece)
            if self.is_over:
                break
        else:
            self._finish = delta.finish or "stop"
            self.is_over = delta.finish is not None
        if self.is_over:
            yield from _say(self._stops.finish())

    def end(self) -> Ended:
        """The last event."""
        return Ended("tool_calls" if self._num_calls else self._finish, self._finish, self._usage)

    def _count(self, delta: Delta, pieces: list[Piece]) -> None:
        self._meter.add(delta, pieces)
        self._usage = replace(
            self._usage,
            prompt_tokens=delta.num_prompt_tokens or len(self._order.prompt_ids),
            completion_tokens=self._usage.completion_tokens + delta.num_tokens,
            reasoning_tokens=self._meter.tokens if self._order.mode == "thinking" else 0,
            cached_tokens=max(self._usage.cached_tokens, delta.num_cached_tokens),
        )

    def _tell(self, piece: Piece) -> Iterator[Event]:
        if piece.channel == "reasoning":
            yield Said("reasoning", piece.text)
            return
        call = parse_call(piece.text) if piece.channel == "call" else None
        if call is not None and call.name in self._order.tool_names:
            # What came before the call is told before it, and no stop reaches across it.
            yield from _say(self._stops.finish())
            yield Called(self._num_calls, call)
            self._num_calls += 1
            self.is_over = self._num_calls == self._order.max_calls
            return
        # A call nobody could answer is shown as what it is: text.
        yield from _say(self._stops.feed(piece.text))
        self.is_over = self._stops.is_met


def _say(text: str) -> Iterator[Said]:
    if text:
        yield Said("answer", text)


class StopStrings:
    """Let text through until the first stop string; what may begin one is held back."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.is_met = False
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> str:
        """Take the next text, give what is certainly before any stop."""
        text = self._held + text
        # The stop that is complete first wins, so chunk boundaries cannot decide between two.
        found = [(text.find(stop) + len(stop), len(stop)) for stop in self._stops if stop in text]
        if found:
            end, size = min(found, key=lambda place: (place[0], -place[1]))
            self.is_met, self._held = True, ""
            return text[: end - size]
        certain = len(text) - self._undecided(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """No more text comes for now: give what was held back."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """How many last characters are the beginning of a stop."""
        return max(
            (
                size
                for stop in self._stops
                for size in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:size])
            ),
            default=0,
        )


class _ReasoningMeter:
    """Counts the tokens up to and with `</think>`, in whole deltas."""

    def __init__(self) -> None:
        self.tokens = 0
        self._unsettled = 0
        self._tail = ""

    def add(self, delta: Delta, pieces: list[Piece]) -> None:
        """A delta that gives no piece, such as a tag, belongs to what comes after it."""
        self._unsettled += delta.num_tokens
        text = self._tail + delta.text
        self._tail = text[-(len(END_THINK) - 1) :]
        if END_THINK in text or any(piece.channel == "reasoning" for piece in pieces):
            self.tokens += self._unsettled
            self._unsettled = 0
        elif pieces:
            self._unsettled = 0
