"""Clients of the soak: a stream's chunks as they come, and what was refused."""

import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

CHAT = "/chat/completions"
Body = Mapping[str, Any]
_SMALL_BYTES = 8192
"""Of buffers: who stops reading shall be noticed at the other end."""
_PATIENCE = aiohttp.ClientTimeout(total=None, sock_read=120)


def count_to(num_words: int, number: int = 0) -> Body:
    """What has the scripted engine say so many words under a number."""
    return {
        "messages": [{"role": "user", "content": f"Count for {number}."}],
        "reasoning": {"enabled": False},
        "max_tokens": num_words,
        "seed": number,
    }


class Refused(Exception):
    """An answer that is no reply."""

    def __init__(self, status: int, body: Any, retry_after: str | None) -> None:
        super().__init__(f"{status}: {body['error']['message']}")
        self.status = status
        self.message = str(body["error"]["message"])
        self.retry_after = retry_after


@dataclass(frozen=True)
class Client:
    """One key's requests to one server."""

    session: aiohttp.ClientSession
    url: str
    key: str

    async def whole(self, body: Body) -> Any:
        """A reply in one piece."""
        async with self._post(body) as response:
            return orjson.loads(await response.read())

    async def chunks(self, body: Body) -> AsyncGenerator[Any, None]:
        """Of a reply as it comes; closing this hangs up."""
        rest = b""
        async with self._post({**body, "stream": True}) as response:
            # A line may be longer than what is buffered, which aiohttp's own reader of lines is not
            # made for.
            async for data in response.content.iter_any():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        yield orjson.loads(line[6:])

    async def get(self, path: str) -> Any:
        """What a route tells; Refused for anything but 200."""
        async with self.session.get(self.url + path, headers=self._headers) as response:
            return await _checked(response)

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @asynccontextmanager
    async def _post(self, body: Body) -> AsyncIterator[aiohttp.ClientResponse]:
        url, headers = self.url + CHAT, self._headers
        async with self.session.post(url, json=body, headers=headers) as response:
            if response.status != 200:
                await _checked(response)
            yield response


async def _checked(response: aiohttp.ClientResponse) -> Any:
    body = orjson.loads(await response.read())
    if response.status != 200:
        raise Refused(response.status, body, response.headers.get("Retry-After"))
    return body


@asynccontextmanager
async def connecting(*, reuses: bool = False) -> AsyncIterator[aiohttp.ClientSession]:
    """Any number of connections with small buffers; each is used once unless they are reused."""
    connector = aiohttp.TCPConnector(limit=0, force_close=not reuses, socket_factory=_small_socket)
    async with aiohttp.ClientSession(
        connector=connector, timeout=_PATIENCE, read_bufsize=_SMALL_BYTES
    ) as session:
        yield session


def _small_socket(address: Any) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BYTES)
    return made
