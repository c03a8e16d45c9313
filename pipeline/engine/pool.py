"""Several engines that serve one model, at URLs, as one engine."""

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from pipeline.engine.protocol import PLAIN, Capability, Delta, Engine, Lane, Sampling
from pipeline.engine.supervisor import backoff_s
from pipeline.errors import EngineDown, EngineError, EngineRefused

log = logging.getLogger(__name__)

CHECK_S = 2.0
MAX_FAILURES = 2
"""So many in a row, of requests or checks, and an engine is asked no more until it is well."""
MAX_DETOUR = 2
"""An engine that may have a prompt in its cache may have so many more replies under way."""
PREFIX_TOKENS = 32
"""What prompts of one conversation, or under one system message, begin with."""

Connect = Callable[[str], Awaitable[Engine]]


class Pool:
    """An Engine over several: use `await Pool.at(...)`, then `close`.

    A request goes to the engine that has the fewest replies under way, or to the one that earlier
    requests of its beginning went to. One that fails before it has said anything is tried once on
    another engine; EngineDown where there is no engine that answers.
    """

    def __init__(self, urls: Sequence[str], connect: Connect) -> None:
        """Not for callers: `at` also connects."""
        self._members = [_Member(url, connect) for url in urls]
        self._checking: asyncio.Future[list[None]] | None = None

    @classmethod
    async def at(cls, urls: Sequence[str], connect: Connect) -> "Pool":
        """Connect to every URL; EngineError of the first one if not a single one answers.

        One that does not answer yet joins as soon as it does.
        """
        pool = cls(urls, connect)
        found = await asyncio.gather(*(m.check() for m in pool._members), return_exceptions=True)
        for member, failure in zip(pool._members, found, strict=True):
            if isinstance(failure, BaseException):
                log.warning("%s; it joins when it answers", failure)
                member.is_out = True
        if isinstance(found[0], BaseException) and not pool._engines:
            await pool.close()
            raise found[0]
        pool._checking = asyncio.gather(*(member.watch() for member in pool._members))
        return pool

    @property
    def context_tokens(self) -> int:
        """What every engine has room for."""
        return min(engine.context_tokens for engine in self._engines)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What every engine can do."""
        return frozenset.intersection(*(engine.capabilities for engine in self._engines))

    def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, lane: Lane = PLAIN
    ) -> AsyncGenerator[Delta, None]:
        """As the chosen engine's own."""
        member = self._choose(prompt_ids, lane)
        if len(self._members) == 1:
            return member.generate(prompt_ids, sampling, lane)
        return self._generate(member, prompt_ids, sampling, lane)

    async def _generate(
        self, member: "_Member", prompt_ids: Sequence[int], sampling: Sampling, lane: Lane
    ) -> AsyncGenerator[Delta, None]:
        has_begun = False
        with contextlib.suppress(_TryAnother):
            async with contextlib.aclosing(member.generate(prompt_ids, sampling, lane)) as deltas:
                try:
                    async for delta in deltas:
                        has_begun = True
                        yield delta
                except EngineRefused:
                    raise
                except EngineError as error:
                    if has_begun or not self._others(member):
                        raise
                    log.warning("%s; trying another engine", error)
                    raise _TryAnother from error
            return
        other = self._choose(prompt_ids, lane, self._others(member))
        async with contextlib.aclosing(other.generate(prompt_ids, sampling, lane)) as deltas:
            async for delta in deltas:
                yield delta

    async def next_token_logprobs(self, prompt_ids: Sequence[int], top: int) -> dict[int, float]:
        """As the chosen engine's own."""
        return await self._choose(prompt_ids, PLAIN).engine.next_token_logprobs(prompt_ids, top)

    async def is_healthy(self) -> bool:
        """Whether at least one engine is asked."""
        return any(not member.is_out for member in self._members)

    async def close(self) -> None:
        """Let go of every engine; twice does no harm."""
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self._engines))

    @property
    def _engines(self) -> list[Engine]:
        return [member.engine for member in self._members if member.is_connected]

    def _others(self, member: "_Member") -> list["_Member"]:
        return [other for other in self._members if other is not member and not other.is_out]

    def _choose(
        self, prompt_ids: Sequence[int], lane: Lane, among: Sequence["_Member"] | None = None
    ) -> "_Member":
        if among is None:
            among = [member for member in self._members if not member.is_out]
        if not among:
            urls = ", ".join(member.url for member in self._members)
            raise EngineDown(f"no engine answers at {urls}", round(CHECK_S))
        if len(among) == 1:
            return among[0]
        # By rendezvous hashing: an engine that leaves or returns moves only its own beginnings.
        begun = lane.session or list(prompt_ids[:PREFIX_TOKENS])
        key = repr((lane.cache_salt, lane.adapter, begun))
        favourite = max(among, key=lambda member: _hash(key, member.url))
        idlest = min(among, key=lambda member: member.num_open)
        is_close = favourite.num_open <= idlest.num_open + MAX_DETOUR
        return favourite if is_close else idlest


class _TryAnother(Exception):
    """Nothing has been said yet."""


class _Member:
    """One engine of a pool, and how it is doing."""

    def __init__(self, url: str, connect: Connect) -> None:
        self.url = url
        self.num_open = 0
        self.is_out = False
        """Whether it is asked no more."""
        self._connect = connect
        self._engine: Engine | None = None
        self._num_failures = 0
        self._num_ejections = 0
        self._back_s = 0.0
        self._last_sign_s = 0.0

    @property
    def is_connected(self) -> bool:
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, lane: Lane
    ) -> AsyncGenerator[Delta, None]:
        self.num_open += 1
        try:
            async with contextlib.aclosing(
                self.engine.generate(prompt_ids, sampling, lane)
            ) as deltas:
                async for delta in deltas:
                    self._last_sign_s = _now()
                    if delta.finish is not None:
                        self._num_failures = self._num_ejections = 0
                    yield delta
        except EngineRefused:
            raise
        except EngineError as error:
            self._fail(str(error))
            raise
        finally:
            self.num_open -= 1

    async def check(self) -> None:
        """EngineError if it cannot be connected to, or is not well."""
        if self._engine is None:
            self._engine = await self._connect(self.url)
        if not await self._engine.is_healthy():
            raise EngineError(f"the engine at {self.url} is not well")

    async def watch(self) -> None:
        """Check it for ever."""
        while True:
            await asyncio.sleep(max(CHECK_S, self._back_s - _now()))
            await self._check_on()

    async def _check_on(self) -> None:
        checked_s = _now()
        try:
            await self.check()
        except EngineError as error:
            # Under load a check may wait behind requests; an engine that gives tokens is alive.
            if self._last_sign_s < checked_s:
                self._fail(str(error))
            return
        if self.is_out:
            log.warning("the engine at %s is well and is asked again", self.url)
            self.is_out, self._num_failures = False, 0

    def _fail(self, why: str) -> None:
        self._num_failures += 1
        if self._num_failures >= MAX_FAILURES and not self.is_out:
            log.error("the engine at %s is asked no more until it is well: %s", self.url, why)
            # One that says it is well and fails all the same is let back in later and later.
            self._back_s = _now() + backoff_s(self._num_ejections)
            self._num_ejections += 1
            self.is_out = True


def _hash(key: str, url: str) -> bytes:
    return hashlib.sha256(f"{key} {url}".encode()).digest()


def _now() -> float:
    return asyncio.get_running_loop().time()
