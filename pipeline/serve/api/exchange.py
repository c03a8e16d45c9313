"""One HTTP request and its response, on bare ASGI."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import orjson
from starlette.types import Message, Receive, Scope, Send

from pipeline.errors import RequestError
from pipeline.serve.monitoring.traces import Trace
from pipeline.serve.skins.chat import CHAT
from pipeline.serve.skins.skin import Skin

STALLED_S = 120.0
"""A client that has read nothing for so long is taken for gone."""
MAX_BODY_BYTES = 8 * 2**20
# A page from anywhere may ask, as there are no cookies: it has a key or gets nothing.
_SHOWN = (
    "X-Generation-Id",
    "X-Provider-Name",
    "X-Ignored-Parameters",
    "Retry-After",
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
    "X-OpenRouter-Cache-Status",
    "X-OpenRouter-Cache-Age",
    "X-OpenRouter-Cache-TTL",
    "X-OpenRouter-Cache-Source-Id",
)
_OF_PROXIES = ("forwarded", "via", "x-forwarded-for", "x-real-ip")
_FOR_BROWSERS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": ", ".join(_SHOWN),
}


class HungUp(Exception):
    """The client has gone; nobody is left to answer."""


@dataclass(frozen=True)
class Opening:
    """How a response begins before there is anything to say, and what then fills its gaps."""

    content_type: str
    headers: Mapping[str, str]
    filler: bytes


class Exchange:
    """What the client sent, and what it has been sent so far."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.is_started = False
        """Whether the status is out, so that no other can be sent."""
        self.has_said = False
        """Whether anything followed it but what fills gaps."""
        self.is_over = False
        self.is_counted = False
        """Whether a metric has it."""
        self.asked_models: tuple[str, ...] = ()
        """As the client wrote them, as soon as it is known; for a failure to name."""
        self.skin: Skin = CHAT
        """The dialect that a failure is told in."""
        self.metadata: dict[str, Any] | None = None
        """How far the request got, if the client wants to know; for a failure to tell."""
        self.trace: Trace | None = None
        """Where it is told, if anywhere."""
        self.last_write_s = 0.0
        """When something was last sent, by the event loop's clock."""
        self._is_writing = False
        self._receive = receive
        self._send = send

    @functools.cached_property
    def headers(self) -> Mapping[str, str]:
        """Of the request, by their names in lower case."""
        pairs = self.scope.get("headers", ())
        return {name.decode("latin-1"): text.decode("latin-1") for name, text in pairs}

    @functools.cached_property
    def query(self) -> Mapping[str, str]:
        """What follows the path's question mark; what is blank counts as absent."""
        return dict(parse_qsl(self.scope.get("query_string", b"").decode("latin-1")))

    @property
    def is_local(self) -> bool:
        """Whether it comes from this machine, and not through a proxy that runs here."""
        host = (self.scope.get("client") or ("",))[0]
        if any(name in self.headers for name in _OF_PROXIES):
            return False
        return host == "::1" or host.startswith("127.")

    async def read_body(self) -> bytes:
        """The request's body; RequestError 413 as soon as it is too long."""
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise RequestError("send the body as it is, without Content-Encoding", 415)
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            raise _too_large()
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise HungUp
            body += message.get("body", b"")
            if len(body) > MAX_BODY_BYTES:
                raise _too_large()
            if not message.get("more_body"):
                return bytes(body)

    async def begin(self, status: int, content_type: str, headers: Mapping[str, str]) -> None:
        """Send status and headers."""
        named = {**_FOR_BROWSERS, "content-type": content_type, **headers}
        self.is_started = True
        await self._write(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.lower().encode(), text.encode()) for name, text in named.items()],
            }
        )

    async def write(self, body: bytes, more: bool = True) -> None:
        """Send a part of the body."""
        self.has_said = True
        self.is_over = not more
        await self._write({"type": "http.response.body", "body": body, "more_body": more})

    async def answer(self, value: Any, status: int, headers: Mapping[str, str]) -> None:
        """Send the whole response, as JSON; where it has begun, what is left of it."""
        body = orjson.dumps(value)
        if not self.is_started:
            length = {"content-length": str(len(body))}
            await self.begin(status, "application/json", {**headers, **length})
        await self.write(body, more=False)

    @contextlib.asynccontextmanager
    async def kept_open(self, opening: Opening, every_s: float) -> AsyncIterator[None]:
        """Send something in every gap: clients, and what is between, give up in silence.

        So a response begins, with a status that may turn out too good, even before it has a word.
        """
        loop, filling = asyncio.get_running_loop(), list[asyncio.Task[None]]()
        self.last_write_s = loop.time()
        # Most are over before the first gap.
        gap = loop.call_later(
            every_s, lambda: filling.append(loop.create_task(self._fill_gaps(opening, every_s)))
        )
        try:
            yield
        finally:
            gap.cancel()
            for task in filling:
                task.cancel()
            # A HungUp it has met is for `unless_hung_up` to tell.
            await asyncio.gather(*filling, return_exceptions=True)

    async def unless_hung_up(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, or drop it at once and raise HungUp when the client goes, or takes nothing.

        Only after `read_body`: it takes what the client sends from then on.
        """
        working = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(self._wait_for_disconnect())
        both, first = {working, watching}, asyncio.FIRST_COMPLETED
        try:
            while not (await asyncio.wait(both, timeout=STALLED_S / 4, return_when=first))[0]:
                if self._is_stalled:
                    raise HungUp
            if not working.done():
                raise HungUp
            working.result()
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _fill_gaps(self, opening: Opening, every_s: float) -> None:
        clock = asyncio.get_running_loop().time
        while not self.is_over:
            wait_s = self.last_write_s + every_s - clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            if not self.is_started:
                await self.begin(200, opening.content_type, opening.headers)
            body = {"type": "http.response.body", "body": opening.filler, "more_body": True}
            await self._write(body)

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    @property
    def _is_stalled(self) -> bool:
        """Whether the client has left what it was sent for too long: it holds an engine's place."""
        silent_s = asyncio.get_running_loop().time() - self.last_write_s
        return self._is_writing and silent_s > STALLED_S

    async def _write(self, message: Message) -> None:
        self._is_writing = True
        try:
            await self._send(message)
        except OSError as error:  # what newer ASGI servers raise once the client has gone
            raise HungUp from error
        self._is_writing = False
        self.last_write_s = asyncio.get_running_loop().time()


def _too_large() -> RequestError:
    return RequestError(f"the body is larger than {MAX_BODY_BYTES} bytes", 413, "payload_too_large")
