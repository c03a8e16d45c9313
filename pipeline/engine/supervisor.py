"""An engine of our own that is warmed, watched, and started again when it dies."""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from pipeline.engine.logs import Logs
from pipeline.engine.protocol import PLAIN, Capability, Delta, Engine, Lane, Sampling
from pipeline.errors import EngineDown, EngineError, EngineRefused

log = logging.getLogger(__name__)

State = Literal["starting", "ready", "down", "draining"]
PROGRESS_S = 10.0
CHECK_S = 2.0
MAX_MISSES = 3
"""So many checks in a row an engine may fail that says nothing; one takes up to ten seconds."""
PATIENCE_S = 20.0
"""How long a request waits for an engine that is starting again."""
CALM_S = 60.0
"""An engine that has lived so long has recovered from its failures before."""
MAX_BACKOFF_S = 60.0
_SETTLE_S = 0.05  # a killed process is known as gone a moment after its socket has closed


class OwnEngine(Engine, Protocol):
    """An engine in a process of ours."""

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended."""
        ...

    @property
    def has_failed(self) -> bool:
        """Whether its log may say why something went wrong."""
        ...

    @property
    def socket(self) -> Path:
        """Where it listens."""
        ...

    async def metrics(self) -> str:
        """What it counts, in Prometheus's text format."""
        ...


Start = Callable[[Path], Awaitable[OwnEngine]]
"""Starts the engine, which writes to the log file it is given."""
Warm = Callable[[Engine], Awaitable[None]]


class Supervisor:
    """An Engine that outlives its process: use `await Supervisor.start(...)`, then `close`.

    While there is no process `generate` raises EngineDown; what was running when it died gets one
    EngineError.
    """

    def __init__(self, name: str, start: Start, warm: Warm, logs: Logs) -> None:
        """Not for callers: `start` also waits until the engine is ready."""
        self.num_restarts = 0
        self.context_tokens = 0
        self.capabilities: frozenset[Capability] = frozenset()
        self._name = name
        self._start = start
        self._warm = warm
        self._logs = logs
        self._log = Path()
        self._engine: OwnEngine | None = None
        self._is_starting = True
        self._is_draining = False
        self._retry_at_s = 0.0
        self._start_s = 0.0
        self._last_sign_s = 0.0
        self._suspected, self._ready = asyncio.Event(), asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, name: str, start: Start, warm: Warm, logs: Logs) -> "Supervisor":
        """Start the engine, warm it, watch it. A first start that fails is not tried again.

        `name` says what is loaded, for people.
        """
        supervisor = cls(name, start, warm, logs)
        await supervisor._begin()
        supervisor._watching = asyncio.create_task(supervisor._watch())
        return supervisor

    @property
    def state(self) -> State:
        """What it is doing; `draining` from the call of `drain` on."""
        if self._is_draining:
            return "draining"
        if self._is_starting:
            return "starting"
        return "ready" if self._is_there else "down"

    def drain(self) -> None:
        """What is running may go on and ask for more; an engine that dies now stays dead."""
        self._is_draining = True

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, lane: Lane = PLAIN
    ) -> AsyncGenerator[Delta, None]:
        """As the engine's own; EngineDown while there is none."""
        engine = await self._current()
        async with contextlib.aclosing(engine.generate(prompt_ids, sampling, lane)) as deltas:
            try:
                async for delta in deltas:
                    self._last_sign_s = _now()
                    yield delta
            except EngineRefused:
                raise
            except EngineError:
                self._suspected.set()
                # So that nobody who has been told of it can meet the dead engine again.
                await asyncio.sleep(_SETTLE_S)
                raise

    async def next_token_logprobs(self, prompt_ids: Sequence[int], top: int) -> dict[int, float]:
        """As the engine's own; EngineDown while there is none."""
        return await (await self._current()).next_token_logprobs(prompt_ids, top)

    async def is_healthy(self) -> bool:
        """Whether requests are taken: it is ready, and as far as is known it lives."""
        return self.state == "ready"

    async def metrics(self) -> str:
        """The engine's own; empty while there is none."""
        engine = self._engine
        return await engine.metrics() if engine is not None and self._is_there else ""

    async def close(self) -> None:
        """End the process and its watch; twice does no harm."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._end()

    @property
    def _is_there(self) -> bool:
        return self._engine is not None and not self._engine.is_gone

    async def _current(self) -> OwnEngine:
        if not self._is_there:
            self._ready.clear()
            self._suspected.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ready.wait(), self._patience_s())
        if self._engine is None or self._engine.is_gone:
            raise EngineDown(f"{self._name} is {self.state}", max(1, math.ceil(self._wait_s)))
        return self._engine

    @property
    def _wait_s(self) -> float:
        """How long until it is ready, if it starts as fast as the last time."""
        return max(self._retry_at_s - _now(), 0) + self._start_s

    def _patience_s(self) -> float:
        """How long it is worth to wait: not at all for a start that is further away."""
        return PATIENCE_S if self._wait_s < PATIENCE_S else 0

    async def _begin(self) -> None:
        """Start and warm; on failure nothing is left but the log."""
        begun_s, self._is_starting, self._log = _now(), True, self._logs.begin()
        engine: OwnEngine | None = None
        log.info("starting %s", self._name)
        telling = asyncio.create_task(self._tell_progress(begun_s))
        try:
            engine = await self._start(self._log)
            await self._warm(engine)
        except BaseException as error:
            if engine is not None:
                await engine.close()
            has_failed = not isinstance(error, asyncio.CancelledError)
            self._logs.end(self._log, has_failed=has_failed)
            raise
        finally:
            telling.cancel()
            self._is_starting = False
        self._engine = engine
        self.context_tokens, self.capabilities = engine.context_tokens, engine.capabilities
        self._start_s = _now() - begun_s
        self._ready.set()
        log.info("%s is ready after %.1f s", self._name, self._start_s)

    async def _tell_progress(self, begun_s: float) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            log.info("still starting %s, %.0f s so far", self._name, _now() - begun_s)

    async def _watch(self) -> None:
        num_failures = 0
        while True:
            ready_s = _now()
            await self._wait_until_dead()
            if self._is_draining:
                return
            log.error("%s has died and is started again; see %s", self._name, self._log)
            num_failures = 0 if _now() - ready_s > CALM_S else num_failures
            await self._end(has_failed=True)
            num_failures = await self._begin_again(num_failures)

    async def _wait_until_dead(self) -> None:
        engine, num_misses = self._engine, 0
        while engine is not None and not engine.is_gone and num_misses < MAX_MISSES:
            checked_s = _now()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._suspected.wait(), CHECK_S)
                await asyncio.sleep(_SETTLE_S)
            self._suspected.clear()
            # Under load a check may wait behind requests; an engine that gives tokens is alive.
            lives = await engine.is_healthy() or self._last_sign_s > checked_s
            num_misses = 0 if lives else num_misses + 1

    async def _begin_again(self, num_failures: int) -> int:
        """Until it starts; how often it has failed in a row, its death included."""
        while True:
            wait_s = backoff_s(num_failures)
            num_failures += 1
            self._retry_at_s = _now() + wait_s
            await asyncio.sleep(wait_s)
            try:
                await self._begin()
            except (EngineError, OSError) as error:
                next_s = backoff_s(num_failures)
                log.error("%s; next attempt in %.0f s", error, next_s)
            else:
                self.num_restarts += 1
                return num_failures

    async def _end(self, *, has_failed: bool = False) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            has_failed = has_failed or engine.has_failed
            await engine.close()
        self._logs.end(self._log, has_failed=has_failed)


def backoff_s(num_failures: int) -> float:
    """How long to wait after so many failures in a row: not at all, then longer and longer."""
    return min(2.0 ** (num_failures - 1), MAX_BACKOFF_S) if num_failures else 0.0


def _now() -> float:
    return asyncio.get_running_loop().time()
