"""The scripted engine as a process: vLLM's dialect, and chat completions for other gateways."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from pipeline.bench.gateway_script import Part, Script, serve_on

MODEL = "scripted"
CONTEXT_TOKENS = 32768
_WORD_ID = 1000
_DONE = b"data: [DONE]\n\n"


@dataclass
class Engine:
    """Every reply says a token a step, as one batch of a GPU would."""

    script: Script
    step_s: float = 0.0
    """0 is as fast as it can; set by a POST to /step."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        routes: dict[str, Callable[[Any], Iterator[bytes]]] = {
            "/v1/completions": self._completion,
            "/v1/chat/completions": self._chat_completion,
        }
        path = scope["path"]
        if path in routes:
            await self._stream(send, routes[path](orjson.loads(await read_body(receive))))
        elif path == "/step":
            self.step_s = float(await read_body(receive))
            await answer(send, 200, {})
        elif path == "/v1/models":
            card = {"id": MODEL, "owned_by": "vllm", "max_model_len": CONTEXT_TOKENS}
            await answer(send, 200, {"data": [card]})
        else:
            await answer(send, 404, {"error": path})

    async def _stream(self, send: Send, events: Iterator[bytes]) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
            await asyncio.sleep(self.step_s)
        await send({"type": "http.response.body", "body": _DONE})

    def _completion(self, body: dict[str, Any]) -> Iterator[bytes]:
        part = self._part(body)
        usage = {"prompt_tokens": len(body["prompt"])}
        for num_tokens, (text, finish, stop_id) in enumerate(_steps(part), start=1):
            usage["completion_tokens"] = num_tokens
            choice = {
                "index": 0,
                "text": text,
                "logprobs": None,
                "finish_reason": finish,
                "stop_reason": stop_id,
                "token_ids": [stop_id or _WORD_ID],
            }
            yield _event("text_completion", [choice], usage)
        yield _event("text_completion", [], usage)

    def _part(self, body: dict[str, Any]) -> Part:
        """What is said to it."""
        return self.script.part(
            body["stop_token_ids"], body["max_tokens"], is_held="structured_outputs" in body
        )

    def _chat_completion(self, body: dict[str, Any]) -> Iterator[bytes]:
        for text, finish, _ in _steps(self.script.part((), body["max_tokens"], is_held=False)):
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
            yield _event("chat.completion.chunk", [choice], None)
        usage = {"prompt_tokens": 1, "completion_tokens": body["max_tokens"], "total_tokens": 2}
        yield _event("chat.completion.chunk", [], usage)


def _steps(part: Part) -> Iterator[tuple[str, str | None, int | None]]:
    """Text, finish and stop of each token; the last of a given length ends with its text."""
    *texts, last = part.texts
    for text in texts:
        yield text, None, None
    if part.finish == "length":
        yield last, "length", None
    else:
        yield last, None, None
        yield "", part.finish, part.stop_id


def _event(kind: str, choices: list[Any], usage: dict[str, int] | None) -> bytes:
    event = {
        "id": "cmpl-6d4f1f9f4c1f4f0f9b0c5a8f7e6d5c4b",
        "object": kind,
        "created": 1767225600,
        "model": MODEL,
        "choices": choices,
        "usage": usage,
    }
    return b"data: " + orjson.dumps(event) + b"\n\n"


async def read_body(receive: Receive) -> bytes:
    """The whole body of a request."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def answer(send: Callable[[Any], Awaitable[None]], status: int, value: Any) -> None:
    """JSON."""
    body = orjson.dumps(value)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    _, descriptor, end_think_id, call_id = map(int, ["0", *sys.argv[1:]])
    serve_on(descriptor, Engine(Script(end_think_id, call_id)))
