"""HTTP in, HTTP out: routes, streams, and every failure in the API's one shape."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import orjson
from starlette.types import Receive, Scope, Send

from pipeline.errors import EngineError, RequestError
from pipeline.serve import schema
from pipeline.serve.catalog import Catalog
from pipeline.serve.dialogue import Event, Said, answer
from pipeline.serve.exchange import Exchange, HungUp
from pipeline.serve.order import Order, decide
from pipeline.serve.request import parse_request

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 10.0
PREFIXES = ("/api/v1", "/v1")
Handler = Callable[[Exchange], Awaitable[None]]
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class _Reply:
    """A reply about to be sent: what was ordered, and what its objects begin with."""

    order: Order
    heading: schema.Heading
    headers: dict[str, str]

    def shows(self, event: Event) -> bool:
        """Whether the client is told; hidden reasoning is still counted."""
        hidden = isinstance(event, Said) and event.channel == "reasoning"
        return self.order.shows_reasoning or not hidden


@dataclass(frozen=True)
class App:
    """The ASGI application over the models of a catalog."""

    catalog: Catalog
    keep_alive_s: float = KEEP_ALIVE_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served here")
        exchange = Exchange(scope, receive, send)
        with contextlib.suppress(HungUp):
            try:
                await self._handler(scope)(exchange)
            except HungUp:
                raise
            except Exception as error:  # noqa: BLE001 - the last resort: an answer to anything
                failure = _as_request_error(error)
                if not exchange.is_started:
                    await exchange.answer(schema.error_body(failure), failure.status, {})

    @functools.cached_property
    def _routes(self) -> dict[str, tuple[str, Handler]]:
        routes: dict[str, tuple[str, Handler]] = {"/health": ("GET", self._health)}
        for prefix in PREFIXES:
            routes[f"{prefix}/chat/completions"] = ("POST", self._chat)
            routes[f"{prefix}/models"] = ("GET", self._models)
        return routes

    def _handler(self, scope: Scope) -> Handler:
        path = scope["path"]
        if path.rstrip("/") not in self._routes:
            raise RequestError(f"{path} is not a route of this API", 404, "not_found")
        method, handler = self._routes[path.rstrip("/")]
        if scope["method"] != method:
            raise RequestError(f"{path} takes {method}, not {scope['method']}", 405)
        return handler

    async def _health(self, exchange: Exchange) -> None:
        healthy = all([await served.engine.is_healthy() for served in self.catalog.models])
        await exchange.answer({"status": "ok" if healthy else "down"}, 200 if healthy else 503, {})

    async def _models(self, exchange: Exchange) -> None:
        await exchange.answer(schema.models_body(self.catalog.models), 200, {})

    async def _chat(self, exchange: Exchange) -> None:
        request = parse_request(await exchange.read_body())
        served = self.catalog.find(request.model)
        # In a thread: a long prompt takes the tokenizer long, and other streams must not wait.
        order = await asyncio.to_thread(decide, request, served)
        created = int(time.time())
        heading = schema.Heading(schema.generation_id(created), created, served.slug)
        headers = {"X-Generation-Id": heading.id}
        if order.ignored:
            headers["X-Ignored-Parameters"] = schema.ignored_header(order.ignored)
        send = self._send_stream if request.stream else self._send_whole

        async def work() -> None:
            async with contextlib.aclosing(answer(order, served.engine)) as events:
                # Nothing is sent before the first event: until then a failure has a status.
                first = await anext(events)
                await send(exchange, _Reply(order, heading, headers), _chain(first, events))

        await exchange.unless_hung_up(work())

    async def _send_whole(
        self, exchange: Exchange, reply: _Reply, events: AsyncGenerator[Event, None]
    ) -> None:
        completion = schema.Completion(reply.heading)
        try:
            async for event in events:
                if reply.shows(event):
                    completion.add(event)
        except EngineError as error:
            completion.error = _as_request_error(error)
        await exchange.answer(completion.body(), 200, reply.headers)

    async def _send_stream(
        self, exchange: Exchange, reply: _Reply, events: AsyncGenerator[Event, None]
    ) -> None:
        await exchange.begin(200, "text/event-stream", {**_STREAM_HEADERS, **reply.headers})
        await exchange.write(schema.KEEP_ALIVE)
        keeping_alive = asyncio.create_task(self._keep_alive(exchange))
        try:
            async for event in events:
                if reply.shows(event):
                    chunks = reply.heading.chunks(event)
                    await exchange.write(b"".join(_frame(chunk) for chunk in chunks))
        except HungUp:
            raise
        except Exception as error:  # noqa: BLE001 - the status is out; the stream must say it
            chunk = reply.heading.error_chunk(_as_request_error(error))
            await exchange.write(_frame(chunk))
        finally:
            keeping_alive.cancel()
            # Nothing of it comes after the end; a HungUp it met is `unless_hung_up`'s to tell.
            await asyncio.gather(keeping_alive, return_exceptions=True)
        await exchange.write(schema.DONE)
        await exchange.write(b"", more=False)

    async def _keep_alive(self, exchange: Exchange) -> None:
        """A comment in every gap, so that nothing between us and the client gives up."""
        clock = asyncio.get_running_loop().time
        while True:
            wait_s = exchange.last_write_s + self.keep_alive_s - clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            else:
                await exchange.write(schema.KEEP_ALIVE)


async def _chain(first: Event, rest: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    yield first
    async for event in rest:
        yield event


def _frame(chunk: dict[str, object]) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _as_request_error(error: Exception) -> RequestError:
    """Any failure as the client may see it; what is ours to mend goes to the log."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineError):
        log.error("%s", error)
        return RequestError("Provider returned error", 502, "provider_unavailable")
    log.error("a request failed", exc_info=error)
    return RequestError(schema.INTERNAL_ERROR, 500, "server")
