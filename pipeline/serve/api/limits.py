"""What a key may still use: refused before an engine is asked, so that no limit is overshot."""

import contextlib
import datetime
import math
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace

from pipeline.errors import RequestError
from pipeline.serve.api.record import Arrival, Record
from pipeline.serve.books.keys import Key
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.books.spending import Spent, period_begins_ms
from pipeline.serve.books.sums import day_of
from pipeline.serve.books.uses import LimitReached, Most, Unaffordable, Uses
from pipeline.serve.offer.door import rate_limit_headers
from pipeline.serve.offer.price import Price, usd_text
from pipeline.serve.replying.events import Usage
from pipeline.serve.routing.endpoint import Answering
from pipeline.serve.routing.route import Route

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Limits:
    """Of all keys, each its own."""

    ledger: Ledger | None
    now_s: Callable[[], float]
    """Since the epoch."""
    uses: Uses

    @contextlib.asynccontextmanager
    async def entered(self, arrival: Arrival) -> AsyncIterator[None]:
        """While a request is answered; RequestError 429 if there are too many of them."""
        key = arrival.key
        if key is None or not key.is_limited:
            yield
            return
        try:
            await self.uses.begin(arrival.id, key)
        except LimitReached as reached:
            raise self._too_much(reached) from None
        try:
            yield
        finally:
            await self.uses.end(arrival.id, key)

    @contextlib.asynccontextmanager
    async def reserved(self, arrival: Arrival, record: Record) -> AsyncIterator[None]:
        """While a reply is made and booked, the most that it can use is taken from its key.

        RequestError 429 or 402 if that is more than is left.
        """
        key, answering = arrival.key, record.answering
        if key is None or not key.is_limited:
            yield
            return
        try:
            await self.uses.reserve(arrival.id, key, _most(arrival, key, answering))
        except LimitReached as reached:
            raise self._too_much(reached) from None
        except Unaffordable as error:
            raise _unaffordable(key, answering, _price(answering), error.left) from None
        try:
            yield
        finally:
            await self.settle(arrival, record)

    async def settle(self, arrival: Arrival, record: Record) -> None:
        """A reply is in the books, or will never be: what it did not use is the key's again.

        Twice does no harm.
        """
        key = arrival.key
        if key is not None and key.is_limited:
            used = _num_tokens(record.usage)
            await self.uses.settle(arrival.id, key, used, record.cost.total)

    async def spent(self, key: Key | None) -> Spent:
        """By its replies that are booked, or wait to be; None is whoever had no key."""
        key_id = key.id if key else None
        return await self.ledger.spent(key_id, self.today()) if self.ledger else Spent()

    async def spent_by_key(self) -> Mapping[int | None, Spent]:
        """The same of all keys."""
        return await self.ledger.spent_by_key(self.today()) if self.ledger else {}

    def today(self) -> datetime.date:
        """By UTC."""
        return day_of(int(self.now_s() * 1000))

    def _too_much(self, reached: LimitReached) -> RequestError:
        retry_after_s = max(1, math.ceil(reached.wait_s))
        left = max(0, reached.most - reached.used)
        headers = rate_limit_headers(reached.most, left, self.now_s() + retry_after_s)
        return RequestError(
            f"Rate limit exceeded: this key may use {reached}; try again in {retry_after_s} s",
            429,
            "rate_limit_exceeded",
            retry_after_s,
            headers=headers,
        )


def _most(arrival: Arrival, key: Key, answering: Answering) -> Most:
    """A reply counts for the day, week or month in which it was asked for, as in the books."""
    asked_ms = int(arrival.created_s * 1000)
    day = day_of(asked_ms)
    begin_ms = period_begins_ms(day)[key.limit_reset]
    return Most(
        _num_tokens(answering.most),
        most_cost(_price(answering), answering.most),
        asked_ms,
        begin_ms,
        max(begin_ms, period_begins_ms(day - _DAY)["daily"]),
    )


def permitted(route: Route, key: Key | None) -> Route:
    """Without the models that the key may not ask; RequestError 403 if none is left."""
    if key is None or key.models is None:
        return route
    endpoints = [e for e in route.endpoints if key.may_ask(e.served.slug)]
    if not endpoints:
        raise RequestError(
            f"{route.requested} is not for this key, which may ask {', '.join(key.models)}",
            403,
            "permission_denied",
        )
    return replace(route, endpoints=tuple(endpoints))


def most_cost(price: Price, most: Usage) -> int:
    """In pico-dollars, whether the prompt is in the engine's cache or not."""
    cached = replace(most, cached_tokens=most.prompt_tokens)
    return max(price.cost(most).total, price.cost(cached).total)


def _price(answering: Answering) -> Price:
    """Of a server elsewhere that tells by itself what a reply has cost: as if made here."""
    return answering.endpoint.price or answering.endpoint.served.price


def _num_tokens(usage: Usage) -> int:
    return usage.prompt_tokens + usage.completion_tokens


def _unaffordable(key: Key, answering: Answering, price: Price, left: int) -> RequestError:
    for_prompt = most_cost(price, replace(answering.most, completion_tokens=0))
    for_each = price.completion * len(answering.tallies)
    num_affordable = (left - for_prompt) // for_each if for_each else 0
    if num_affordable > 0:
        what = (
            "This request requires more credits, or fewer max_tokens. You requested up to "
            f"{answering.max_completion_tokens} tokens, but can only afford {num_affordable}."
        )
    else:
        limit = f"{usd_text(key.limit_picodollars or 0)} USD"
        when = f"{limit} {key.limit_reset}" if key.limit_reset else limit
        what = (
            f"Insufficient credits: {usd_text(max(left, 0))} USD are left of this key's limit of "
            f"{when}; wait for replies under way or a reset, or have the limit raised"
        )
    return RequestError(what, 402, "payment_required")
