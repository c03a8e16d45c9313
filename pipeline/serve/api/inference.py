"""A request for a reply in any dialect: read, routed, tried where it may be, answered, booked."""

import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace

from pipeline.errors import BooksError, EngineError, RequestError
from pipeline.serve import schema
from pipeline.serve.api.asking import Asking
from pipeline.serve.api.exchange import Exchange, HungUp
from pipeline.serve.api.failures import as_request_error, is_passing
from pipeline.serve.api.limits import Limits, permitted
from pipeline.serve.api.record import Arrival, Record
from pipeline.serve.api.repeating import find_wish
from pipeline.serve.api.response_cache import ResponseCache
from pipeline.serve.api.sending import Reply, send_stream, send_whole
from pipeline.serve.asking.presets import with_preset
from pipeline.serve.asking.request import parse_object
from pipeline.serve.books.keys import Key
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.content.log import ContentLog
from pipeline.serve.monitoring.metrics import Metrics
from pipeline.serve.monitoring.reply_log import tell
from pipeline.serve.monitoring.traces import attempt, step
from pipeline.serve.offer.catalog import Catalog
from pipeline.serve.replying.choices import Indexed
from pipeline.serve.replying.events import Usage
from pipeline.serve.routing.endpoint import Answering, Endpoint
from pipeline.serve.routing.endpoints import Endpoints
from pipeline.serve.routing.route import asked_models, find_route
from pipeline.serve.schema.metadata import Attempt
from pipeline.serve.skins.skin import Bill, Heading, Skin

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inference:
    """Handlers of the routes that generate."""

    catalog: Catalog
    endpoints_of: Endpoints
    ledger: Ledger | None
    limits: Limits
    cache: ResponseCache
    keep_alive_s: float
    metrics: Metrics = field(default_factory=Metrics)
    content_log: ContentLog | None = None

    async def answer(self, exchange: Exchange, key: Key | None, skin: Skin) -> None:
        """Raises what the client must be told, unless something was sent."""
        arrival = Arrival.now(key, exchange.headers, self.limits.now_s())
        async with self.limits.entered(arrival):
            await self._answer(exchange, arrival, skin)

    async def _answer(self, exchange: Exchange, arrival: Arrival, skin: Skin) -> None:
        body = await exchange.read_body()
        values = parse_object(body)
        asked = skin.read(values)
        exchange.asked_models = asked_models(asked)
        request = with_preset(asked, self.catalog.presets)
        route = find_route(request, self.catalog, self.endpoints_of)
        route = replace(route, requested=(*exchange.asked_models, route.requested)[0])
        route = permitted(route, arrival.key)
        if exchange.trace:
            operation = "chat" if request.messages else "text_completion"
            exchange.trace.asked(operation, route.endpoints[0].served.slug, arrival.id)
        path = exchange.scope["path"]
        repeating = find_wish(self.cache, arrival, path, body, route, request)
        asking = Asking(exchange, skin, arrival, values, request, route, repeating)
        earlier = repeating.find() if repeating else None
        work = self._repeat(asking, *earlier) if earlier else self._try_all(asking)
        async with exchange.kept_open(asking.opening, self.keep_alive_s):
            try:
                await exchange.unless_hung_up(work)
            except RequestError as failure:
                if not exchange.is_started:
                    raise
                await _tell_late(asking, failure)

    async def _repeat(
        self, asking: Asking, answering: Answering, headers: Mapping[str, str], source: str
    ) -> None:
        """Tell it as if it had just been made, for nothing."""
        record = Record(asking.arrival, asking.request, answering, cache_source=source)
        try:
            await self._send(asking, record, record.noted(answering.replies), headers)
        finally:
            await self.book(asking, record)

    async def _try_all(self, asking: Asking) -> None:
        """Each endpoint until one has begun to answer; the last one's failure is the client's."""
        left = list(asking.route.endpoints)
        while left:
            endpoint = left.pop(0)
            try:
                with attempt(asking.exchange.trace, endpoint.provider):
                    await self._try(asking, endpoint, is_last=not left)
                return
            except (RequestError, EngineError) as error:
                if asking.exchange.has_said:
                    raise
                failure = as_request_error(error)
                asking.attempts[-1] = Attempt(endpoint, failure.status)
                if not is_passing(failure):
                    left = [other for other in left if other.served is not endpoint.served]
                # What went wrong inside is nobody's business, nor is how the request got there.
                is_ours = failure.status == schema.INTERNAL_STATUS
                asking.exchange.metadata = None if is_ours else asking.metadata(None)
                if not left:
                    raise failure from error
                log.warning("%s: %s; trying another", endpoint.served.slug, failure)

    async def _try(self, asking: Asking, endpoint: Endpoint, *, is_last: bool) -> None:
        asking.attempts.append(Attempt(endpoint, 200))
        endpoint.door.check(asking.guest)
        with step(asking.exchange.trace, "decide"):
            answering = await endpoint.prepare(asking.request, asking.lane)
        keeps = asking.repeating is not None
        record = Record(asking.arrival, asking.request, answering, keeps_events=keeps)
        async with self.limits.reserved(asking.arrival, record):
            await self._make(asking, record, endpoint, is_last=is_last)

    async def _make(
        self, asking: Asking, record: Record, endpoint: Endpoint, *, is_last: bool
    ) -> None:
        if self.ledger:
            self.ledger.follow(record.id, record.generation)
        try:
            async with contextlib.AsyncExitStack() as inside:
                with step(asking.exchange.trace, "queue"):
                    await inside.enter_async_context(endpoint.door.entered(asking.guest))
                await self._reply(asking, record)
            if asking.repeating:
                asking.repeating.keep(record)
        except HungUp:
            raise
        except Exception as error:
            record.error = as_request_error(error)
            record.is_booked |= not is_last and not asking.exchange.has_said
            raise record.error from error  # so that it is told, and logged, once
        finally:
            await self.book(asking, record)
            if self.ledger:
                self.ledger.unfollow(record.id)

    async def _reply(self, asking: Asking, record: Record) -> None:
        answering = record.answering
        async with contextlib.aclosing(record.noted(answering.replies)) as events:
            # Nothing is sent before the first event: until then a failure has a status.
            with step(asking.exchange.trace, "first token"):
                first = await anext(events)
            headers = asking.repeating.headers if asking.repeating else {}
            await self._send(asking, record, _chain(first, events), headers)

    async def _send(
        self,
        asking: Asking,
        record: Record,
        events: AsyncGenerator[Indexed, None],
        headers: Mapping[str, str],
    ) -> None:
        answering, request = record.answering, asking.request
        heading = asking.heading(
            answering.endpoint,
            has_logprobs=answering.has_logprobs,
            num_choices=len(answering.tallies),
            num_prompt_tokens=answering.num_prompt_tokens,
        )
        reply = Reply(
            record,
            asking.skin.writer(heading),
            {**_headers(heading, answering), **headers},
            functools.partial(asking.metadata, answering),
            functools.partial(self.book, asking, record),
            asking.is_healed,
        )
        send = send_stream if request.stream else send_whole
        await send(asking.exchange, reply, events)

    async def book(self, asking: Asking, record: Record) -> None:
        """Into metrics and ledger, once; books that cannot be written hold no reply up."""
        if record.is_booked:
            return
        record.is_booked = asking.exchange.is_counted = True
        generation = record.generation()
        self.metrics.replied(generation, record.status, record.gaps, asking.arrival.key)
        tell(generation, record.status, asking.arrival.key)
        if asking.exchange.trace:
            asking.exchange.trace.tell(generation, record.status)
        if self.content_log and record.logs_content:
            self.content_log.put(record.entry(generation, asking.exchange.scope["path"]))
        if self.ledger is None:
            return
        try:
            await self.ledger.record(generation)
        except BooksError as error:
            log.error("%s", error)
        await self.limits.settle(asking.arrival, record)


async def _tell_late(asking: Asking, failure: RequestError) -> None:
    """In the body, as the status is out."""
    exchange, skin = asking.exchange, asking.skin
    if exchange.trace:
        exchange.trace.fail(failure.status, failure.error_type)
    if not asking.request.stream:
        body = skin.error_body(failure, exchange.asked_models, exchange.metadata)
        await exchange.answer(body, failure.status, {})
        return
    writer = skin.writer(asking.heading(asking.route.endpoints[-1]))
    bill = Bill(Usage(), metadata=exchange.metadata)
    await exchange.write(writer.begin(None) + writer.fail(failure, bill), more=False)


def _headers(heading: Heading, answering: Answering) -> dict[str, str]:
    headers = {"X-Generation-Id": heading.id, "X-Provider-Name": heading.provider}
    if answering.ignored:
        headers["X-Ignored-Parameters"] = schema.ignored_header(answering.ignored)
    return headers


async def _chain(
    first: Indexed, rest: AsyncGenerator[Indexed, None]
) -> AsyncGenerator[Indexed, None]:
    yield first
    async for event in rest:
        yield event
