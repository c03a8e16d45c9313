"""A stream as it came: its frames, and the reply that they make."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from pipeline.serve.probes.client import Body, parse
from pipeline.serve.probes.reply import Choice, Reply, read_logprobs
from pipeline.serve.probes.seen import Fault

DONE = "[DONE]"


@dataclass
class Stream:
    """Everything of it, in order."""

    content_type: str
    frames: list[Body] = field(default_factory=list)
    num_comments: int = 0
    is_done: bool = False
    """Whether it said so, as its last word."""

    def choices(self) -> list[Body]:
        """Every bit of every choice."""
        found: list[Body] = []
        for frame in self.frames:
            if not isinstance(frame.get("choices"), list):
                raise Fault("a chunk has no choices")
            found += frame["choices"]
        return found

    def reply(self) -> Reply:
        """What it says of its first choice."""
        bits = [bit for bit in self.choices() if bit.get("index") == 0]
        deltas = [bit.get("delta") or {} for bit in bits]
        finishes = [bit["finish_reason"] for bit in bits if bit.get("finish_reason")]
        logprobs = [found for bit in bits if (found := read_logprobs(bit)) is not None]
        choice = Choice(
            "".join(delta.get("content") or "" for delta in deltas),
            "".join(delta.get("reasoning") or "" for delta in deltas),
            _calls(deltas),
            finishes[-1] if finishes else None,
            [token for found in logprobs for token in found] if logprobs else None,
        )
        usages = [frame["usage"] for frame in self.frames if frame.get("usage") is not None]
        return Reply(self.frames[0].get("model"), [choice], usages[-1] if usages else None)


async def read_stream(response: aiohttp.ClientResponse) -> Stream:
    """To its end."""
    stream = Stream(response.headers.get("Content-Type", ""))
    async for line in lines(response):
        if stream.is_done:
            raise Fault(f"something comes after {DONE}")
        if line.startswith(":"):
            stream.num_comments += 1
        elif line == f"data: {DONE}":
            stream.is_done = True
        else:
            stream.frames.append(read_frame(line))
    return stream


def read_frame(line: str) -> Body:
    """The object of one line."""
    name, colon, value = line.partition(":")
    if name != "data" or not colon:
        raise Fault(f"a line of the stream begins with {name[:20]!r}, not with data:")
    frame = parse(value.encode())
    if "error" in frame:
        raise Fault(f"the stream breaks: {frame['error']}")
    return frame


async def lines(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """Each as it comes; the empty ones between events are left out."""
    async for line in response.content:
        if text := line.decode(errors="replace").strip():
            yield text


def _calls(deltas: Sequence[Body]) -> list[tuple[str, str]]:
    """Put together from their bits; Fault for a call that does not begin with its name."""
    calls: dict[Any, tuple[str, str]] = {}
    for bit in (bit for delta in deltas for bit in delta.get("tool_calls") or ()):
        index, function = bit.get("index"), bit.get("function") or {}
        if index not in calls:
            if not (bit.get("id") and function.get("name") and bit.get("type") == "function"):
                raise Fault("the first bit of a tool call lacks its id, type or name")
            calls[index] = (function["name"], "")
        name, arguments = calls[index]
        calls[index] = (name, arguments + (function.get("arguments") or ""))
    return list(calls.values())
