"""A small server that does all it declares, and breaks the one rule that a test wants broken."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Body = dict[str, Any]
MODEL, KEY = "acme/tiny", "sk-or-v1-right"
NAMES = [
    "frequency_penalty",
    "include_reasoning",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "min_p",
    "n",
    "parallel_tool_calls",
    "presence_penalty",
    "reasoning",
    "reasoning_effort",
    "repetition_penalty",
    "response_format",
    "seed",
    "stop",
    "structured_outputs",
    "temperature",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
]
_WORDS = ["The", "capital", "of", "France", "is", "Paris", ",", "as", "everybody", "knows", "."]
DONE = b"data: [DONE]\n\n"
_OBJECT = ['{"colour": ', '"blue", "is_deep": ', "true}"]


def _same(value: Any) -> Any:
    return value


@dataclass
class Honest:
    """What is bent on the way out, and what is never heard of a request."""

    ignores: str = ""
    bend: Callable[[Body], Body] = _same
    """A whole reply."""
    bend_frames: Callable[[list[Any]], list[Any]] = _same
    """The chunks of a stream, as JSON or as text."""
    bend_refusal: Callable[[web.Response], web.Response] = _same
    bend_document: Callable[[Body], Body] = _same
    names: list[str] = field(default_factory=lambda: [*NAMES])
    """Declared."""
    refuses: Callable[[Body], int | None] = lambda _body: None
    """The status of an answer that should be a reply."""
    stream_type: str = "text/event-stream"
    is_open: bool = False
    """To everybody."""
    tells_cancelled: bool = True
    _cancelled: dict[str, bool] = field(default_factory=dict)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """Gives the base URL."""
        app = web.Application()
        app.router.add_get("/provider/v1/models", self._models)
        app.router.add_get("/v1/generation", self._generation)
        app.router.add_post("/v1/chat/completions", self._chat)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()

    async def _models(self, _request: web.Request) -> web.Response:
        parameters = {name: {"type": "unknown"} for name in self.names}
        document = {
            "schema_version": "2.4",
            "id": MODEL,
            "name": "Tiny",
            "input_modalities": [{"type": "text"}],
            "output_modalities": [{"type": "text", "supported_parameters": parameters}],
        }
        return web.json_response({"data": [self.bend_document(document)]})

    async def _generation(self, request: web.Request) -> web.Response:
        cancelled = self._cancelled[request.query["id"]] and self.tells_cancelled
        return web.json_response({"data": {"cancelled": cancelled}})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {KEY}" and not self.is_open:
            return self._refuse(401)
        try:
            body = json.loads(await request.read())
        except ValueError:
            return self._refuse(400)
        if not isinstance(body["messages"], list) or body["model"] != MODEL:
            return self._refuse(400)
        if status := self.refuses(body):
            return self._refuse(status)
        body.pop(self.ignores, None)
        choices, usage = answer(body)
        if body.get("stream"):
            return await self._stream(request, body, [*chunks(choices[0]), _ending(usage), DONE])
        whole = {"id": "gen-1", "model": MODEL, "choices": choices, "usage": usage}
        return web.json_response(self.bend(whole))

    def _refuse(self, status: int) -> web.Response:
        error = {"error": {"code": status, "message": "no"}}
        return self.bend_refusal(web.json_response(error, status=status))

    async def _stream(
        self, request: web.Request, body: Body, frames: list[Any]
    ) -> web.StreamResponse:
        name = f"gen-{len(self._cancelled)}"
        self._cancelled[name] = True  # until it has ended
        headers = {"Content-Type": self.stream_type, "X-Generation-Id": name}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await response.write(b": PROCESSING\n\n")
        while "five hundred" in body["messages"][0]["content"]:
            await response.write(_frame(frames[0]))
            await asyncio.sleep(0.01)
        for frame in self.bend_frames(frames):
            await response.write(frame if isinstance(frame, bytes) else _frame(frame))
        self._cancelled[name] = False
        return response


def answer(body: Body) -> tuple[list[Body], Body]:
    """Choices, and usage."""
    thought = ["I ", "recall."] if _thinks(body) else []
    tokens, finish = _say(body)
    calls = _calls(body)
    if calls:
        tokens, finish = [], "tool_calls"
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 100
    if len(thought + tokens) + 1 > limit:
        tokens, finish = tokens[: limit - len(thought)], "length"
    message: Body = {"role": "assistant", "content": "".join(tokens)}
    if thought and body.get("include_reasoning") is not False:
        message["reasoning"] = "".join(thought)
    if calls:
        message["tool_calls"] = calls
    choice: Body = {"index": 0, "finish_reason": finish, "message": message, "logprobs": None}
    if body.get("logprobs"):
        top = body.get("top_logprobs") or 0
        choice["logprobs"] = {"content": [_logprob(token, top) for token in tokens]}
    count = len(thought + tokens) + (finish != "length")
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": count,
        "total_tokens": 5 + count,
        "completion_tokens_details": {"reasoning_tokens": len(thought)},
    }
    return [choice] * (body.get("n") or 1), usage


def _thinks(body: Body) -> bool:
    is_off = (body.get("reasoning") or {}).get("enabled") is False
    return not is_off and body.get("reasoning_effort") != "none"


def _say(body: Body) -> tuple[list[str], str]:
    """Tokens; hot ones are shuffled, unless only the likeliest are left."""
    if (body.get("response_format") or {}).get("type") in ("json_object", "json_schema"):
        return _OBJECT, "stop"
    if body.get("logit_bias"):
        return [chr(int(token)) for token in body["logit_bias"]] * 4, "stop"
    tokens = [f"{word} " for word in _WORDS]
    is_cut = body.get("top_k") == 1 or body.get("top_p") == 1e-6 or body.get("min_p") == 1
    if body.get("temperature", 1) > 0 and not is_cut:
        random.Random(body.get("seed")).shuffle(tokens)
    if any(body.get(f"{kind}_penalty") for kind in ("frequency", "presence", "repetition")):
        tokens.reverse()
    for stop in body.get("stop") or ():
        text = "".join(tokens)
        if stop in text:
            return [text[: text.index(stop)]], "stop"
    return tokens, "stop"


def _calls(body: Body) -> list[Body]:
    choice = body.get("tool_choice") or "auto"
    if not body.get("tools") or choice == "none":
        return []
    name = choice["function"]["name"] if isinstance(choice, dict) else "get_weather"
    call = {"name": name, "arguments": '{"city": "Paris"}'}
    count = 1 if body.get("parallel_tool_calls") is False else 2
    return [{"id": f"call_{i}", "type": "function", "function": call} for i in range(count)]


def _logprob(token: str, top: int) -> Body:
    code = list(token.encode())
    others = [{"token": token, "logprob": -0.1 - i, "bytes": code} for i in range(top)]
    return {"token": token, "logprob": -0.1, "bytes": code, "top_logprobs": others}


def chunks(choice: Body) -> list[Body]:
    """A choice in two bits and its end."""
    message = choice["message"]
    calls = [{"index": i} | call for i, call in enumerate(message.get("tool_calls", ()))]
    deltas = [
        {"role": "assistant", "content": "", "reasoning": message.get("reasoning")},
        {"role": "assistant", "content": message["content"]},
        {"role": "assistant", "content": ""},
    ]
    if calls:
        deltas[1]["tool_calls"] = calls
    bits: list[Body] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    bits[1]["logprobs"], bits[2]["finish_reason"] = choice["logprobs"], choice["finish_reason"]
    return [{"id": "gen-1", "model": MODEL, "choices": [bit]} for bit in bits]


def _ending(usage: Body) -> Body:
    return {"id": "gen-1", "model": MODEL, "choices": [], "usage": usage}


def _frame(frame: Body) -> bytes:
    return f"data: {json.dumps(frame)}\n\n".encode()
