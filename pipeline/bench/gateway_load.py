"""Streams asked for over plain sockets, so that asking takes as little of the machine as can be."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import orjson

from pipeline.errors import PipelineError

_HEADERS_END = b"\r\n\r\n"
_END = b"\r\n0\r\n\r\n"
"""Of a chunked body."""


@dataclass(frozen=True)
class Target:
    """Who is asked, and how."""

    name: str
    url: str
    """Of the route itself."""
    headers: Mapping[str, str]

    def request(self, body: Mapping[str, Any]) -> bytes:
        """As it goes over the connection."""
        address, text = urlsplit(self.url), orjson.dumps(body)
        lines = [f"POST {address.path} HTTP/1.1", f"Host: {address.netloc}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += ["Content-Type: application/json", f"Content-Length: {len(text)}", "", ""]
        return "\r\n".join(lines).encode() + text


@dataclass(frozen=True)
class Streamed:
    """One reply."""

    first_s: float
    """From the request to the first event."""
    num_events: int
    """`[DONE]` and comments are none."""


class Connection(asyncio.Protocol):
    """One kept open, asked one thing after another."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._begun_s = 0.0
        self._first_s: float | None = None
        self._num_events = 0
        self._is_ok = self._is_done = False
        self._told: asyncio.Future[Streamed] = asyncio.get_running_loop().create_future()

    @classmethod
    async def to(cls, target: Target) -> Self:
        """Open one."""
        address, loop = urlsplit(target.url), asyncio.get_running_loop()
        transport, made = await loop.create_connection(
            lambda: cls(target.name), str(address.hostname), address.port or 80
        )
        made._transport = transport
        return made

    async def ask(self, request: bytes) -> Streamed:
        """PipelineError for anything but a whole stream of events."""
        assert self._transport is not None
        self._told = asyncio.get_running_loop().create_future()
        self._rest, self._num_events = b"", 0
        self._first_s = None
        self._is_ok = self._is_done = False
        self._begun_s = time.perf_counter()
        self._transport.write(request)
        return await self._told

    def close(self) -> None:
        """Let go of it."""
        assert self._transport is not None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Count the events; nobody reads them."""
        data = self._rest + data
        end = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
        self._num_events += data.count(b"data: {", 0, end)
        self._rest = data[end:]
        self._is_ok = self._is_ok or data.startswith(b"HTTP/1.1 200 ")
        self._is_done = self._is_done or b"[DONE]" in data
        if self._num_events and self._first_s is None:
            self._first_s = time.perf_counter() - self._begun_s
        if not (self._rest.endswith(_END) if self._is_ok else _HEADERS_END in self._rest):
            return
        if self._first_s is not None and self._is_done:
            self._told.set_result(Streamed(self._first_s, self._num_events))
        else:
            said = data[-500:].decode(errors="replace")
            self._told.set_exception(PipelineError(f"{self._name} gave no stream: {said}"))

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's word for it."""
        if not self._told.done():
            self._told.set_exception(PipelineError(f"{self._name} broke off: {error}"))


async def ask_at_once(target: Target, bodies: Sequence[Mapping[str, Any]]) -> list[Streamed]:
    """All at the same moment, over connections that are open already."""
    connections = [await Connection.to(target) for _ in bodies]
    try:
        requests = [target.request(body) for body in bodies]
        asking = [c.ask(r) for c, r in zip(connections, requests, strict=True)]
        return await asyncio.gather(*asking)
    finally:
        for connection in connections:
            connection.close()


async def rate(target: Target, body: Mapping[str, Any], streams: int) -> tuple[float, int]:
    """Events a second of so many streams at once, and how many they were."""
    begun_s = time.perf_counter()
    told = await ask_at_once(target, [body] * streams)
    num_events = sum(reply.num_events for reply in told)
    return num_events / (time.perf_counter() - begun_s), num_events
