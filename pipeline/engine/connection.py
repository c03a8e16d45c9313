"""HTTP to an engine, over a child's socket or to a URL, with every failure as an EngineError."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import orjson

from pipeline.engine.child import Child
from pipeline.errors import EngineDown, EngineError, EngineRefused, EngineTimeout

_CONNECT_S = 10
_SHORT_TIMEOUT = aiohttp.ClientTimeout(total=10)
_REFUSALS = (400, 413, 422)  # the request's own fault; any other status is the engine's
_BUSY = (429, 503, 529)
_MAX_WAIT_S = 3600


class Connection:
    """Requests and event streams of one engine server; `name` is what failures call it.

    Nothing but its own URL is ever asked: redirects are not followed.
    """

    def __init__(
        self,
        name: str,
        url: str,
        child: Child | Path | None = None,
        api_key: str = "",
        silence_s: float | None = None,
        idle_s: float = 0.0,
    ) -> None:
        """`child` may be the socket of another process's.

        `silence_s` is how long it may say nothing while an answer is awaited.

        `idle_s` is how long a connection is kept for the next request: less than the server keeps
        it, or the two would meet.
        """
        self.name = name
        self.url = url.rstrip("/")
        self.child = child if isinstance(child, Child) else None
        socket = child.socket if isinstance(child, Child) else child
        self.is_elsewhere = socket is None
        """Whether somebody else runs it, with whatever options."""
        self._api_key = api_key
        self._idle_s = idle_s
        self.has_failed = False
        """Whether a failure has sent somebody to the child's log."""
        self._open: set[aiohttp.ClientResponse] = set()
        # Not for llama.cpp, which closes idle connections in a race with the next request on them.
        keeping: dict[str, Any] = {"keepalive_timeout": idle_s} if idle_s else {"force_close": True}
        connector = (
            aiohttp.UnixConnector(str(socket), limit=0, **keeping)
            if socket
            else aiohttp.TCPConnector(limit=0, **keeping)
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=silence_s),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        )

    @property
    def is_gone(self) -> bool:
        """Whether the engine was our child, and has ended."""
        return self.child is not None and self.child.is_gone

    async def answers(self, path: str) -> bool:
        """Whether GET on a path gives 200."""
        try:
            async with self._get(path) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path, whatever its status."""
        try:
            async with self._get(path) as response:
                return self.parse(await response.read())
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self.died("does not answer") from error

    async def text(self, path: str) -> str:
        """What a path gives."""
        try:
            async with self._get(path) as response:
                response.raise_for_status()
                return await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self.died("does not answer") from error

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that a POST gives."""
        async with self._posted(path, body) as response:
            return self.parse(await response.read())

    async def tell(self, path: str, body: Mapping[str, Any]) -> None:
        """POST something whose answer is no more than that it went well."""
        async with self._posted(path, body):
            pass

    async def events(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] = MappingProxyType({})
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The JSON of each event that a POST gives; `[DONE]` and comments are none."""
        rest = b""
        async with self._posted(path, body, headers) as response:
            # A chunk of the connection may hold several events, or half a one; an event is a line.
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    name, _, value = line.partition(b":")
                    if name not in (b"data", b"error"):
                        continue
                    if value.strip() != b"[DONE]":
                        yield self.parse(value)
                    elif not self._idle_s:  # what is to be kept must be read to its end
                        return

    def died(self, what: str) -> EngineError:
        """What happened, and where to look."""
        if self.child is None:
            return EngineError(f"{self.name} at {self.url} {what}")
        self.has_failed = True
        return EngineError(f"{self.name} {what}; see {self.child.log}")

    def parse(self, text: bytes) -> dict[str, Any]:
        """A JSON object; EngineError for anything else."""
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise EngineError(f"{self.name} answered something that is not a JSON object")
        return value

    def reason(self, answer: Mapping[str, Any]) -> str:
        """Why it refuses, in one line that does not repeat our key."""
        text = message(answer)
        return text.replace(self._api_key, "…") if self._api_key else text

    async def close(self) -> None:
        """End the child, if there is one, and close every connection; twice does no harm.

        Who waits for a response gets an EngineError: aiohttp would leave them waiting for ever.
        """
        if self.child is not None:
            await self.child.end()
        for response in list(self._open):
            response.close()
        await self._session.close()

    def _get(self, path: str) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        url = self.url + path
        return self._session.get(url, timeout=_SHORT_TIMEOUT, allow_redirects=False)

    @contextlib.asynccontextmanager
    async def _posted(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] = MappingProxyType({})
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.post(
                self.url + path,
                data=orjson.dumps(body),
                headers={"Content-Type": "application/json", **headers},
                allow_redirects=False,
            ) as response:
                if response.status != 200:
                    raise self._refusal(response, await response.read())
                self._open.add(response)
                try:
                    yield response
                finally:
                    self._open.discard(response)
        except aiohttp.SocketTimeoutError as error:
            raise EngineTimeout(f"{self.name} at {self.url} has said nothing for long") from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self.died(f"does not answer ({type(error).__name__})") from error

    def _refusal(self, response: aiohttp.ClientResponse, body: bytes) -> EngineError:
        try:
            reason = self.reason(self.parse(body))
        except EngineError:
            reason = "it gave no reason"
        what = f"{self.name} refused: {reason} ({response.status})"
        if response.status in _BUSY:
            wait_s = response.headers.get("Retry-After", "")
            return EngineDown(what, min(int(wait_s[:9]), _MAX_WAIT_S) if wait_s.isdecimal() else 1)
        return EngineRefused(what) if response.status in _REFUSALS else EngineError(what)


def message(answer: Mapping[str, Any]) -> str:
    """The reason in an error's body, of one line."""
    error = answer.get("error")
    reason = error.get("message") if isinstance(error, dict) else error
    return str(reason or "it gave no reason").split("\n")[0]
