"""A request to an application inside the test's own process, without a network."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.serve.api.app import App


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def content_type(self) -> str:
        return self.headers["content-type"].partition(";")[0]


async def ask(
    app: App,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    query: bytes = b"",
    client: tuple[str, int] | None = None,
) -> Answer:
    """The path is decoded already, as a server gives it."""
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": body}]

    async def receive() -> Any:
        return parts.pop() if parts else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    pairs = [
        (name.lower().encode("latin-1"), text.encode("latin-1"))
        for name, text in (headers or {}).items()
    ]
    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "headers": pairs}
    scope["client"] = client
    await app({**scope, "query_string": query}, receive, send)
    start, *bodies = sent
    named = {name.decode("latin-1"): text.decode("latin-1") for name, text in start["headers"]}
    return Answer(start["status"], named, b"".join(part["body"] for part in bodies))
