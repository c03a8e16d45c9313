"""A server elsewhere that speaks this API, asked to answer in the place of a model here."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from pipeline.engine.connection import Connection
from pipeline.errors import EngineDown, EngineError, EngineRefused
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.monitoring.traces import onward_headers
from pipeline.serve.offer.catalog import Upstream
from pipeline.serve.replying.choices import Indexed
from pipeline.serve.replying.events import Tally
from pipeline.serve.routing.upstream_reply import UpstreamReply
from pipeline.serve.schema import PARAMETERS

SILENCE_S = 120.0
"""It may say nothing for so long, not even the comment that keeps a stream alive."""
CHECKED_S = 10.0
"""Whether it is well is asked once in this time."""
# Which model, who answers and how it is booked is decided here, and nobody else's to know.
_OURS = frozenset(
    [
        "model",
        "models",
        "route",
        "provider",
        "plugins",
        "transforms",
        "preset",
        "debug",
        "session_id",
        "cache_control",
        "prompt_cache_key",
        "prompt_cache_options",
        "user",
        "metadata",
        "trace",
        "stream",
        "stream_options",
        "usage",
    ]
)
# Tokens have no ids on the wire, and their texts are not those of the tokenizer here.
_UNANSWERED = frozenset(["logprobs", "top_logprobs"])
SUPPORTED = PARAMETERS - _UNANSWERED
"""The parameters it can take."""
_BUSY = (429, 503, 529)
_REFUSALS = (400, 413, 422)


class Elsewhere:
    """One upstream, over connections of its own: made within an event loop, closed at the end."""

    def __init__(self, upstream: Upstream, silence_s: float = SILENCE_S) -> None:
        self.upstream = upstream
        self._connection = Connection(
            upstream.provider, upstream.url, api_key=upstream.key, silence_s=silence_s
        )
        self._checking = asyncio.Lock()
        self._checked_s = float("-inf")
        self._is_well = False

    async def answer(
        self, request: ChatRequest, tallies: Sequence[Tally]
    ) -> AsyncGenerator[Indexed, None]:
        """The events of every choice, each under its index; closing this hangs up.

        There is one tally for each choice; they are up to date once the last events come. Before
        the first event: EngineDown if it may answer later, EngineRefused if the request is at
        fault, EngineError for the rest.
        """
        tells_cost = self.upstream.price is None
        reply = UpstreamReply(self.upstream.provider, tallies, tells_cost=tells_cost)
        has_begun = False
        path = "/chat/completions" if request.messages else "/completions"
        chunks = self._connection.events(path, self.body(request), onward_headers())
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                if chunk.get("error"):
                    raise self._failure(chunk, has_begun)
                for indexed in reply.read(chunk):
                    has_begun = True
                    yield indexed
        for indexed in reply.end():
            yield indexed

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """What it is asked: what the client gave, without what is ours to decide."""
        given = request.model_dump(exclude_none=True, by_alias=True, exclude=set(_OURS))
        text = "prompt" if request.messages else "messages"
        unasked = {text, *_UNANSWERED}
        return {
            "model": self.upstream.model,
            **{name: value for name, value in given.items() if name not in unasked},
            "stream": True,
            # Both ask for the usage, the second of older servers also for the cost.
            "stream_options": {"include_usage": True},
            "usage": {"include": True},
        }

    def ignored(self, request: ChatRequest) -> tuple[str, ...]:
        """Names of the fields that the client gave and that change nothing there."""
        return tuple(name for name in sorted(_UNANSWERED) if getattr(request, name) is not None)

    async def is_healthy(self) -> bool:
        """Whether it tells its models, or did some seconds ago."""
        async with self._checking:
            now_s = asyncio.get_running_loop().time()
            if now_s - self._checked_s >= CHECKED_S:
                self._is_well = await self._connection.answers("/models")
                self._checked_s = now_s
            return self._is_well

    async def close(self) -> None:
        """Let go of every connection; twice does no harm."""
        await self._connection.close()

    def _failure(self, chunk: Mapping[str, Any], has_begun: bool) -> EngineError:
        """A failure after its status: in the place of the first chunk, or of any other."""
        error = chunk["error"]
        code = error.get("code") if isinstance(error, dict) else None
        what = f"{self.upstream.provider} failed: {self._connection.reason(chunk)} ({code})"
        if has_begun:
            return EngineError(what)
        if code in _BUSY:
            return EngineDown(what)
        return EngineRefused(what) if code in _REFUSALS else EngineError(what)
