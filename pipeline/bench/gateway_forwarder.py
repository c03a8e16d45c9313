"""The least a gateway could be: render and tokenise, ask the engine, pass its bytes on."""

import sys
from pathlib import Path

import aiohttp
import orjson
from starlette.types import Receive, Scope, Send

from pipeline.bench.gateway_engine import MODEL, read_body
from pipeline.bench.gateway_script import serve_on
from pipeline.chat import Chat


class Forwarder:
    """No key, no books, no check, no change of an event: a bound for what is faster than we are."""

    def __init__(self, chat: Chat, engine: str) -> None:
        self._chat = chat
        self._url = f"{engine}/v1/completions"
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever its path."""
        if self._session is None:
            # uvicorn closes what is idle for 5 s, in a race with the next request on it.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
            self._session = aiohttp.ClientSession(connector=connector)
        asked = orjson.loads(await read_body(receive))
        body = {
            "model": MODEL,
            "prompt": self._chat.prompt_ids(asked["messages"], None, "direct"),
            "max_tokens": asked["max_tokens"],
            "stop_token_ids": [],
            "stream": True,
        }
        async with self._session.post(self._url, data=orjson.dumps(body)) as response:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for chunk in response.content.iter_any():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    serve_on(int(sys.argv[1]), Forwarder(Chat(Path(sys.argv[2])), sys.argv[3]))
