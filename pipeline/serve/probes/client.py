"""Requests to a server, as a router sends them."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from pipeline.serve.probes.seen import Fault, quoted

Body = dict[str, Any]
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Answer:
    """One that came whole."""

    status: int
    content_type: str
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Body:
        """The object that it is."""
        if self.content_type != "application/json":
            raise Fault(f"status {self.status} comes as {self.content_type or 'no type'}, not JSON")
        return parse(self.content)

    def error(self) -> str:
        """What it refuses, if it does so in the API's shape."""
        error = self.json().get("error")
        if not isinstance(error, dict) or not isinstance(error.get("message"), str):
            raise Fault(f"status {self.status} has no error.message: {quoted(self._text)}")
        if not isinstance(error.get("code"), int | str | None):
            raise Fault(f"error.code is {error['code']!r}")
        return str(error["message"])

    @property
    def _text(self) -> str:
        return self.content.decode(errors="replace")


class Client:
    """Of one server; `url` ends in /v1, as for any client."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._key = key

    async def get(self, url: str) -> Answer:
        """The answer at an address."""
        async with self._asked("GET", url, self._headers(self._key), None) as response:
            return await _whole(response)

    async def post(self, body: Mapping[str, Any] | bytes, key: str | None = None) -> Answer:
        """The answer to a chat request, with another key if one is given; an empty one is none."""
        async with self.open(body, self._key if key is None else key) as response:
            return await _whole(response)

    def open(
        self, body: Mapping[str, Any] | bytes, key: str | None = None
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """The answer to a chat request as it begins; leaving it closes the connection."""
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        headers = self._headers(self._key if key is None else key)
        return self._asked("POST", f"{self.url}/chat/completions", headers, content)

    @contextlib.asynccontextmanager
    async def _asked(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.request(
                method, url, data=content, headers=headers
            ) as response:
                yield response
        except TimeoutError as error:
            raise Fault(f"no end after {_TIMEOUT_S} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Fault(f"it does not answer: {error or type(error).__name__}") from error

    def _headers(self, key: str) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        return headers | ({"Authorization": f"Bearer {key}"} if key else {})


@contextlib.asynccontextmanager
async def connect(url: str, key: str) -> AsyncIterator[Client]:
    """A client whose every request has a connection of its own."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Client(session, url, key)


def parse(text: bytes) -> Body:
    """A JSON object."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Fault(f"it is not JSON: {quoted(text.decode(errors='replace'))}") from error
    if not isinstance(value, dict):
        raise Fault(f"it is no JSON object: {quoted(text.decode(errors='replace'))}")
    return value


async def _whole(response: aiohttp.ClientResponse) -> Answer:
    content = await response.read()
    # aiohttp has a default for a type that is not said.
    said = response.headers.get("Content-Type", "")
    content_type = said.partition(";")[0].strip().lower()
    return Answer(response.status, content_type, response.headers, content)
