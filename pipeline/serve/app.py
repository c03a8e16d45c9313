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

from pipeline.errors import (
    Availability,
    BooksError,
    EngineDown,
    EngineError,
    EngineRefused,
    RequestError,
)
from pipeline.serve import schema
from pipeline.serve.account import Account
from pipeline.serve.catalog import Catalog
from pipeline.serve.choices import Indexed, answer_all
from pipeline.serve.events import Event, Said
from pipeline.serve.exchange import Exchange, HungUp
from pipeline.serve.keys import Key, Keys
from pipeline.serve.ledger import Ledger
from pipeline.serve.models import Models
from pipeline.serve.order import decide
from pipeline.serve.record import Record
from pipeline.serve.request import parse_request
from pipeline.serve.routes import Handler, Routes

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 10.0
KeyHandler = Callable[[Exchange, Key | None], Awaitable[None]]
"""Told whose request it is; None where the server wants no key."""
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class _Reply:
    """A reply about to be sent."""

    record: Record
    heading: schema.Heading
    headers: dict[str, str]

    def shows(self, event: Event) -> bool:
        """Whether the client is told; hidden reasoning is still counted."""
        hidden = isinstance(event, Said) and event.channel == "reasoning"
        return self.record.order.shows_reasoning or not hidden


@dataclass(frozen=True)
class App:
    """The ASGI application over the models of a catalog."""

    catalog: Catalog
    keys: Keys | None = None
    """None lets everybody in."""
    ledger: Ledger | None = None
    keep_alive_s: float = KEEP_ALIVE_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served here")
        exchange = Exchange(scope, receive, send)
        with contextlib.suppress(HungUp):
            try:
                await self._routes.find(scope)(exchange)
            except HungUp:
                raise
            except Exception as error:  # noqa: BLE001 - the last resort: an answer to anything
                failure = _as_request_error(error)
                if not exchange.is_started:
                    wait_s = failure.retry_after_s
                    headers = {} if wait_s is None else {"Retry-After": str(wait_s)}
                    body = schema.error_body(failure, exchange.asked_models)
                    await exchange.answer(body, failure.status, headers)

    @functools.cached_property
    def _routes(self) -> Routes:
        models, account = Models(self.catalog), Account(self.ledger)
        of_server: dict[str, tuple[str, Handler]] = {
            "/health": ("GET", self._health),
            "/ready": ("GET", self._ready),
        }
        of_api: dict[str, tuple[str, Handler]] = {
            "/chat/completions": ("POST", self._chat),
            "/embeddings": ("POST", self._for_key(models.embed)),
            "/models": ("GET", models.all),
            "/models/count": ("GET", models.count),
            "/models/user": ("GET", self._for_key(models.of_key)),
            "/endpoints/zdr": ("GET", models.all_endpoints),
            "/providers": ("GET", models.providers),
            "/key": ("GET", self._for_key(account.key)),
            "/auth/key": ("GET", self._for_key(account.key)),
            "/credits": ("GET", self._for_key(account.credits)),
            "/generation": ("GET", self._for_key(account.generation)),
            "/generation/content": ("GET", self._for_key(account.content)),
            "/activity": ("GET", self._for_key(account.activity)),
        }
        of_models = {
            "/model/{model}": models.one,
            "/models/{model}/endpoints": models.endpoints,
        }
        return Routes(of_server, of_api, of_models)

    def _for_key(self, handler: KeyHandler) -> Handler:
        async def answer(exchange: Exchange) -> None:
            await handler(exchange, await self._admit(exchange))

        return answer

    async def _health(self, exchange: Exchange) -> None:
        """Whether this process answers; `_ready` says whether it answers requests."""
        await exchange.answer({"status": "ok"}, 200, {})

    async def _ready(self, exchange: Exchange) -> None:
        is_ready = await self.catalog.is_ready()
        status = "ready" if is_ready else "not ready"
        await exchange.answer({"status": status}, 200 if is_ready else 503, {})

    async def _chat(self, exchange: Exchange) -> None:
        begun_s = time.monotonic()
        key = await self._admit(exchange)
        request = parse_request(await exchange.read_body())
        exchange.asked_models = (request.model,) if request.model else ()
        served = self.catalog.find(request.model)
        # In a thread: a long prompt takes the tokenizer long, and other streams must not wait.
        order = await asyncio.to_thread(decide, request, served)
        record = Record(served, request, order, key, exchange.headers, begun_s)
        try:
            await exchange.unless_hung_up(self._reply(exchange, record))
        except HungUp:
            raise
        except Exception as error:
            record.error = _as_request_error(error)
            raise record.error from error  # so that it is told, and logged, once
        finally:
            await self._book(record)

    async def _reply(self, exchange: Exchange, record: Record) -> None:
        order, served = record.order, record.served
        heading = schema.Heading(
            record.id,
            record.created,
            served.slug,
            served.chat,
            order.top_logprobs is not None,
        )
        headers = {"X-Generation-Id": heading.id}
        if order.ignored:
            headers["X-Ignored-Parameters"] = schema.ignored_header(order.ignored)
        send = self._send_stream if record.request.stream else self._send_whole
        replies = answer_all(order, served.chat, served.engine, record.tallies)
        async with contextlib.aclosing(record.noted(replies)) as events:
            # Nothing is sent before the first event: until then a failure has a status.
            first = await anext(events)
            await send(exchange, _Reply(record, heading, headers), _chain(first, events))

    async def _send_whole(
        self, exchange: Exchange, reply: _Reply, events: AsyncGenerator[Indexed, None]
    ) -> None:
        record = reply.record
        completions = [schema.Completion(index) for index in range(record.order.num_choices)]
        try:
            async for index, event in events:
                if reply.shows(event):
                    completions[index].add(event)
        except EngineError as error:
            record.error = _as_request_error(error)
        await self._book(record)
        body = schema.completion_body(reply.heading, completions, record.usage, record.error)
        await exchange.answer(body, 200, reply.headers)

    async def _send_stream(
        self, exchange: Exchange, reply: _Reply, events: AsyncGenerator[Indexed, None]
    ) -> None:
        await exchange.begin(200, "text/event-stream", {**_STREAM_HEADERS, **reply.headers})
        await exchange.write(schema.KEEP_ALIVE)
        keeping_alive = asyncio.create_task(self._keep_alive(exchange))
        record, heading = reply.record, reply.heading
        try:
            async for index, event in events:
                if reply.shows(event):
                    chunks = heading.chunks(index, event)
                    await exchange.write(b"".join(_frame(chunk) for chunk in chunks))
            await self._book(record)
            await exchange.write(_frame(heading.usage_chunk(record.usage)))
        except HungUp:
            raise
        except Exception as error:  # noqa: BLE001 - the status is out; the stream must say it
            record.error = _as_request_error(error)
            await exchange.write(_frame(heading.error_chunk(record.error)))
        finally:
            keeping_alive.cancel()
            # Nothing of it comes after the end; a HungUp it met is `unless_hung_up`'s to tell.
            await asyncio.gather(keeping_alive, return_exceptions=True)
        await exchange.write(schema.DONE)
        await exchange.write(b"", more=False)

    async def _admit(self, exchange: Exchange) -> Key | None:
        """Whose request it is; RequestError 401 for one that must not be answered."""
        if self.keys is None:
            return None
        headers = exchange.headers
        return await self.keys.check(headers.get("authorization"), headers.get("x-api-key"))

    async def _book(self, record: Record) -> None:
        """Into the ledger, once; a reply is not held up by books that cannot be written."""
        if self.ledger is None or record.is_booked:
            return
        record.is_booked = True
        try:
            await self.ledger.record(record.generation())
        except BooksError as error:
            log.error("%s", error)

    async def _keep_alive(self, exchange: Exchange) -> None:
        """A comment in every gap, so that nothing between us and the client gives up."""
        clock = asyncio.get_running_loop().time
        while True:
            wait_s = exchange.last_write_s + self.keep_alive_s - clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            else:
                await exchange.write(schema.KEEP_ALIVE)


async def _chain(
    first: Indexed, rest: AsyncGenerator[Indexed, None]
) -> AsyncGenerator[Indexed, None]:
    yield first
    async for event in rest:
        yield event


def _frame(chunk: dict[str, object]) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _as_request_error(error: Exception) -> RequestError:
    """Any failure as the client may see it; what is ours to mend goes to the log."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineDown):
        wait_s = error.retry_after_s
        availability = Availability("temporarily_unavailable", retryable=True)
        return RequestError(str(error), 503, "provider_overloaded", wait_s, availability)
    if isinstance(error, EngineRefused):
        return RequestError(str(error))
    if isinstance(error, EngineError):
        log.error("%s", error)
        return RequestError("Provider returned error", 502, "provider_unavailable")
    log.error("a request failed", exc_info=error)
    return RequestError(schema.INTERNAL_ERROR, 500, "server")
