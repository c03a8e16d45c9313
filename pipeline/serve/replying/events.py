"""What a client is told of a reply, in order: bits of text, calls, and the end."""

from dataclasses import dataclass
from typing import Literal

from pipeline.chat import ToolCall
from pipeline.engine.protocol import TokenLogprob


@dataclass(frozen=True)
class Usage:
    """Tokens of one reply. Reasoning is part of the completion, cached part of the prompt."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Tally:
    """The usage of a reply so far, for whoever must know it when the reply breaks off."""

    usage: Usage = Usage()
    cost_picodollars: int | None = None
    """What another server has asked for it; None is by our own price."""


@dataclass(frozen=True)
class Said:
    """A bit of reasoning or answer."""

    channel: Literal["reasoning", "answer"]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the answer's tokens that begin in this bit, if they were asked for."""


@dataclass(frozen=True)
class Called:
    """One whole tool call; `index` counts from 0."""

    index: int
    call: ToolCall


@dataclass(frozen=True)
class Ended:
    """The last event of a reply."""

    finish: Literal["stop", "length", "tool_calls", "content_filter"]
    native_finish: str
    """In the words of what has generated it."""
    stop: str | None = None
    """The request's stop string that ended it; None if none did, or nobody knows."""


Event = Said | Called | Ended
