"""What a key's requests use of its limits: counted in this process, or in the books for several."""

import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.serve.books.keys import Key
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.books.window import WAIT_S, Window


class LimitReached(Exception):
    """One request more would be too much."""

    def __init__(self, what: str, most: int, used: int, wait_s: float) -> None:
        """`what` is the limit in words, and `wait_s` when it may have room again."""
        super().__init__(what)
        self.most = most
        self.used = used
        self.wait_s = wait_s


class Unaffordable(Exception):
    """A reply may cost more than is left."""

    def __init__(self, left: int) -> None:
        """In pico-dollars; less than nothing if a limit was lowered."""
        super().__init__(left)
        self.left = left


@dataclass(frozen=True)
class Most:
    """What a reply may come to, and where what its key has spent is counted from."""

    tokens: int
    cost: int
    """In pico-dollars."""
    asked_ms: int
    """When it was asked for, since the epoch."""
    begin_ms: int
    """When the key's limit of money had last begun anew then."""
    recent_ms: int
    """No reply from before this moment can still come into the books."""


class Uses(Protocol):
    """Requests by their ids; of a key without limits none need be known."""

    async def begin(self, use_id: str, key: Key) -> None:
        """A request has come; LimitReached if it is one too many."""
        ...

    async def reserve(self, use_id: str, key: Key, most: Most) -> None:
        """It is about to be answered; LimitReached or Unaffordable, and it holds nothing."""
        ...

    async def settle(self, use_id: str, key: Key, tokens: int, cost: int) -> None:
        """Its reply is in the books; what it really used takes the place of what it held."""
        ...

    async def end(self, use_id: str, key: Key) -> None:
        """It is over, whether or not there was a reply."""
        ...


def too_many_streams(most: int, used: int) -> LimitReached:
    """As every way of counting says it."""
    return LimitReached(f"{most} at the same time", most, used, WAIT_S)


def too_many_requests(most: int, used: int, wait_s: float) -> LimitReached:
    """The same."""
    return LimitReached(f"{most} requests a minute", most, used, wait_s)


def too_many_tokens(most: int, used: int, wait_s: float) -> LimitReached:
    """The same."""
    return LimitReached(f"{most} tokens a minute", most, used, wait_s)


@dataclass
class _Account:
    """One key's use in this process."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    under_way: set[str] = field(default_factory=set)
    granted: dict[str, int] = field(default_factory=dict)
    """Tokens."""
    reserved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """When a reply was asked for, since the epoch, and its pico-dollars."""
    num_settled: int = 0


class OwnUses:
    """In this process alone: of several each would grant all of a limit."""

    def __init__(
        self, ledger: Ledger | None, elapsed_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Minutes pass by `elapsed_s`."""
        self._elapsed_s = elapsed_s
        self._ledger = ledger
        self._earlier = Earlier(ledger)
        self._accounts: dict[int, _Account] = collections.defaultdict(_Account)

    async def begin(self, use_id: str, key: Key) -> None:
        """Take a place among the requests of the minute, and among those under way."""
        account, now_s = self._accounts[key.id], self._elapsed_s()
        if key.streams is not None and len(account.under_way) >= key.streams:
            raise too_many_streams(key.streams, len(account.under_way))
        most, num_requests = key.requests_per_minute, account.requests.total(now_s)
        if most is not None and num_requests >= most:
            wait_s = account.requests.wait_s(now_s, most - 1)
            raise too_many_requests(most, num_requests, wait_s)
        if most is not None:
            account.requests.add(now_s, 1)
        account.under_way.add(use_id)

    async def reserve(self, use_id: str, key: Key, most: Most) -> None:
        """Tokens first: they are known without the books."""
        account = self._accounts[key.id]
        if key.tokens_per_minute is not None:
            self._grant(use_id, account, most.tokens, key.tokens_per_minute)
        if key.limit_picodollars is None:
            return
        try:
            await self._reserve(use_id, key, key.limit_picodollars, most)
        except BaseException:
            account.granted.pop(use_id, None)
            raise

    async def settle(self, use_id: str, key: Key, tokens: int, cost: int) -> None:  # noqa: ARG002
        """The books have its cost."""
        account = self._accounts[key.id]
        if account.granted.pop(use_id, None) is not None:
            account.tokens.add(self._elapsed_s(), tokens)
        if account.reserved.pop(use_id, None) is not None:
            account.num_settled += 1

    async def end(self, use_id: str, key: Key) -> None:
        """Leave its place to the next."""
        self._accounts[key.id].under_way.discard(use_id)

    def _grant(self, use_id: str, account: _Account, tokens: int, most: int) -> None:
        """A request that may use more than a whole minute's has to have that minute to itself."""
        granted, now_s = min(tokens, most), self._elapsed_s()
        held = sum(account.granted.values())
        used = held + account.tokens.total(now_s)
        if used + granted > most:
            wait_s = account.tokens.wait_s(now_s, most - granted - held)
            raise too_many_tokens(most, used, wait_s)
        account.granted[use_id] = granted

    async def _reserve(self, use_id: str, key: Key, limit: int, most: Most) -> None:
        """A reply counts for the day, week or month in which it was asked for, as in the books."""
        account = self._accounts[key.id]
        while True:
            num_settled = account.num_settled
            spent = await self._earlier.cost(key, most)
            if self._ledger:
                spent += await self._ledger.cost(key.id, most.recent_ms)
            if num_settled == account.num_settled:  # else one may be in neither count
                break
        held = [cost for asked_ms, cost in account.reserved.values() if asked_ms >= most.begin_ms]
        left = limit - spent - sum(held)
        if most.cost > left:
            raise Unaffordable(left)
        account.reserved[use_id] = (most.asked_ms, most.cost)


class Earlier:
    """What keys have spent on days that are over: it may be millions of rows, summed once."""

    def __init__(self, ledger: Ledger | None) -> None:
        """Without a ledger, nothing."""
        self._ledger = ledger
        self._sums: dict[int, tuple[int, int, int]] = {}

    async def cost(self, key: Key, most: Most) -> int:
        """From when the limit began anew to what is recent, in pico-dollars."""
        if self._ledger is None:
            return 0
        between = (most.begin_ms, most.recent_ms)
        known = self._sums.get(key.id, (0, 0, 0))
        if known[:2] != between:
            known = (*between, await self._ledger.cost(key.id, *between))
            self._sums[key.id] = known
        return known[2]
