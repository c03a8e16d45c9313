"""HTTP to an engine, over a child's socket or to a URL, with every failure as an EngineError."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import aiohttp
import orjson

from pipeline.engine.child import Child
from pipeline.errors import EngineError, EngineRefused

_CONNECT_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10)
_SHORT_TIMEOUT = aiohttp.ClientTimeout(total=10)
_REFUSALS = (400, 413, 422)  # the request's own fault; any other status is the engine's


class Connection:
    """Requests and event streams of one engine server; `name` is what failures call it."""

    def __init__(self, name: str, url: str, child: Child | None = None, api_key: str = "") -> None:
        self.name = name
        self.url = url.rstrip("/")
        self.child = child
        self.has_failed = False
        """Whether a failure has sent somebody to the child's log."""
        self._open: set[aiohttp.ClientResponse] = set()
        # llama.cpp closes kept-alive connections in a race with the next request on them.
        connector = (
            aiohttp.UnixConnector(str(child.socket), limit=0, force_close=True)
            if child
            else aiohttp.TCPConnector(limit=0, force_close=True)
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=_CONNECT_TIMEOUT,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        )

    @property
    def is_gone(self) -> bool:
        """Whether the engine was our child, and has ended."""
        return self.child is not None and self.child.is_gone

    async def answers(self, path: str) -> bool:
        """Whether GET on a path gives 200."""
        try:
            async with self._session.get(self.url + path, timeout=_SHORT_TIMEOUT) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path, whatever its status."""
        try:
            async with self._session.get(self.url + path, timeout=_SHORT_TIMEOUT) as response:
                return self.parse(await response.read())
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
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The JSON of each event that a POST gives; `[DONE]` and comments are none."""
        rest = b""
        async with self._posted(path, body) as response:
            # A chunk of the connection may hold several events, or half a one.
            async for chunk in response.content.iter_any():
                *whole, rest = (rest + chunk).split(b"\n\n")
                for event in whole:
                    name, _, value = event.partition(b": ")
                    if name in (b"data", b"error") and value != b"[DONE]":
                        yield self.parse(value)

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

    async def close(self) -> None:
        """End the child, if there is one, and close every connection; twice does no harm.

        Who waits for a response gets an EngineError: aiohttp would leave them waiting for ever.
        """
        if self.child is not None:
            await self.child.end()
        for response in list(self._open):
            response.close()
        await self._session.close()

    @contextlib.asynccontextmanager
    async def _posted(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.post(
                self.url + path,
                data=orjson.dumps(body),
                headers={"Content-Type": "application/json"},
            ) as response:
                if response.status != 200:
                    reason = message(self.parse(await response.read()))
                    kind = EngineRefused if response.status in _REFUSALS else EngineError
                    raise kind(f"{self.name} refused: {reason} ({response.status})")
                self._open.add(response)
                try:
                    yield response
                finally:
                    self._open.discard(response)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self.died("does not answer") from error


def message(answer: Mapping[str, Any]) -> str:
    """The reason in an error's body, of one line."""
    error = answer.get("error")
    reason = error.get("message") if isinstance(error, dict) else error
    return str(reason or "it gave no reason").split("\n")[0]
