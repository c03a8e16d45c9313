"""What the engines of the gateway's benchmark say."""

import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import uvicorn

from pipeline.engine.protocol import Finish

# Not the same one again and again: LiteLLM breaks such a stream off.
_WORDS = (" one", " two")
_CALL = ["\n", '{"name":', ' "look_up",', ' "arguments":', ' {"word":', ' "word"}', "}", "\n"]


@dataclass(frozen=True)
class Part:
    """One continuation, a token a text; what ends it is one token more, but for the length."""

    texts: list[str]
    finish: Finish
    stop_id: int | None = None


@dataclass(frozen=True)
class Script:
    """By its tags' ids it knows a thought from an answer."""

    end_think_id: int
    call_id: int

    def part(self, stop_ids: Collection[int], max_tokens: int, *, is_held: bool) -> Part:
        """A thought has no end of its own, an answer that may call does so halfway.

        `is_held` is a continuation under a grammar: that of a call.
        """
        if is_held:
            return Part([*_CALL, "</tool_call>"], "stop")
        if self.end_think_id in stop_ids:
            return Part(["<think>", "\n", *_words(max_tokens - 2)], "length")
        if self.call_id in stop_ids:
            return Part(_words(max_tokens // 2), "stop", self.call_id)
        return Part(_words(max_tokens), "length")


def _words(num: int) -> list[str]:
    return [_WORDS[place % 2] for place in range(num)]


def serve_on(descriptor: int, app: Any) -> None:
    """An application on a socket that listens already, until the process ends."""
    # asyncio switches Nagle's delay off only where the protocol is named.
    listener = socket.socket(
        socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=descriptor
    )
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        loop="uvloop",
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run([listener])
