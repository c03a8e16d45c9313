"""What a key may still use: refused before an engine is asked, so that no limit is overshot.

Money is counted by the books and by the replies under way in this process. Requests and tokens of
the last minute, and requests at the same time, are counted in this process alone: of several
processes each grants all of them.
"""

import collections
import contextlib
import datetime
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from pipeline.errors import RequestError
from pipeline.serve.api.record import Arrival, Record
from pipeline.serve.api.window import WAIT_S, Window
from pipeline.serve.books.keys import Key
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.books.spending import Spent, period_begins_ms
from pipeline.serve.offer.door import rate_limit_headers
from pipeline.serve.offer.price import Price, usd_text
from pipeline.serve.replying.events import Usage
from pipeline.serve.routing.endpoint import Answering
from pipeline.serve.routing.route import Route

_DAY = datetime.timedelta(days=1)


@dataclass
class _Account:
    """One key's use in this process."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    num_under_way: int = 0
    reserved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By generation: when it was asked for, and its pico-dollars."""
    num_settled: int = 0
    earlier: tuple[int, int, int] = (0, 0, 0)
    """What was spent between two moments of days that are over: nothing is added to it."""


@dataclass(frozen=True)
class Limits:
    """Of all keys, each its own."""

    ledger: Ledger | None
    now_s: Callable[[], float] = time.time
    """Since the epoch."""
    elapsed_s: Callable[[], float] = time.monotonic
    _accounts: dict[int, _Account] = field(
        default_factory=lambda: collections.defaultdict(_Account), init=False
    )

    @contextlib.contextmanager
    def entered(self, key: Key | None) -> Iterator[None]:
        """While a request is answered; RequestError 429 if there are too many of them."""
        if key is None:
            yield
            return
        account, now_s = self._accounts[key.id], self.elapsed_s()
        if key.streams is not None and account.num_under_way >= key.streams:
            what = f"{key.streams} at the same time"
            raise self._too_much(what, key.streams, account.num_under_way, WAIT_S)
        most, num_requests = key.requests_per_minute, account.requests.total(now_s)
        if most is not None and num_requests >= most:
            wait_s = account.requests.wait_s(now_s, most - 1)
            raise self._too_much(f"{most} requests a minute", most, num_requests, wait_s)
        if most is not None:
            account.requests.add(now_s, 1)
        account.num_under_way += 1
        try:
            yield
        finally:
            account.num_under_way -= 1

    @contextlib.asynccontextmanager
    async def reserved(self, arrival: Arrival, record: Record) -> AsyncIterator[None]:
        """While a reply is made and booked, the most that it can use is taken from its key.

        RequestError 429 or 402 if that is more than is left.
        """
        key = arrival.key
        if key is None:
            yield
            return
        with self._granted_tokens(key, record):
            if key.limit_picodollars is None:
                yield
                return
            account = self._accounts[key.id]
            await self._reserve(key, key.limit_picodollars, arrival, record.answering)
            try:
                yield
            finally:
                del account.reserved[arrival.id]
                account.num_settled += 1

    async def spent(self, key: Key | None) -> Spent:
        """By its replies that are in the books; None is whoever had no key."""
        key_id = key.id if key else None
        return await self.ledger.spent(key_id, self.today()) if self.ledger else Spent()

    async def spent_by_key(self) -> Mapping[int | None, Spent]:
        """The same of all keys."""
        return await self.ledger.spent_by_key(self.today()) if self.ledger else {}

    def today(self) -> datetime.date:
        """By UTC."""
        return _day(self.now_s())

    @contextlib.contextmanager
    def _granted_tokens(self, key: Key, record: Record) -> Iterator[None]:
        """A request that may use more than a whole minute's has to have that minute to itself."""
        most = key.tokens_per_minute
        if most is None:
            yield
            return
        window, now_s = self._accounts[key.id].tokens, self.elapsed_s()
        granted = min(_num_tokens(record.answering.most), most)
        used = window.total(now_s)
        if used + granted > most:
            wait_s = window.wait_s(now_s, most - granted)
            raise self._too_much(f"{most} tokens a minute", most, used, wait_s)
        window.granted += granted
        try:
            yield
        finally:
            window.granted -= granted
            window.add(self.elapsed_s(), _num_tokens(record.usage))

    async def _reserve(self, key: Key, limit: int, arrival: Arrival, answering: Answering) -> None:
        """A reply counts for the day, week or month in which it was asked for, as in the books."""
        account, day = self._accounts[key.id], _day(arrival.created_s)
        begin_ms = period_begins_ms(day)[key.limit_reset]
        while True:
            num_settled = account.num_settled
            spent = await self._spent_since(key, begin_ms, day)
            if num_settled == account.num_settled:  # else one may be in neither count
                break
        held = sum(amount for asked_ms, amount in account.reserved.values() if asked_ms >= begin_ms)
        left, price = limit - spent - held, _price(answering)
        most = most_cost(price, answering.most)
        if most > left:
            raise _unaffordable(key, answering, price, left)
        account.reserved[arrival.id] = (int(arrival.created_s * 1000), most)

    async def _spent_since(self, key: Key, begin_ms: int, day: datetime.date) -> int:
        """All of it may be millions of rows; those of days that are over are summed once."""
        if self.ledger is None:
            return 0
        account = self._accounts[key.id]
        end_ms = max(begin_ms, period_begins_ms(day - _DAY)["daily"])
        if account.earlier[:2] != (begin_ms, end_ms):
            earlier = await self.ledger.cost(key.id, begin_ms, end_ms)
            account.earlier = (begin_ms, end_ms, earlier)
        return account.earlier[2] + await self.ledger.cost(key.id, end_ms)

    def _too_much(self, what: str, most: int, used: int, wait_s: float) -> RequestError:
        retry_after_s = max(1, math.ceil(wait_s))
        headers = rate_limit_headers(most, max(0, most - used), self.now_s() + retry_after_s)
        return RequestError(
            f"Rate limit exceeded: this key may use {what}; try again in {retry_after_s} s",
            429,
            "rate_limit_exceeded",
            retry_after_s,
            headers=headers,
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


def _day(now_s: float) -> datetime.date:
    return datetime.datetime.fromtimestamp(now_s, datetime.UTC).date()


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
