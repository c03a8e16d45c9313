"""What keys' requests use of their limits, counted in the books: for several processes at once.

Each request of a key with limits is a row of `uses` from its arrival until a minute after its end.
A process tells the books every few seconds that it lives; what one that does not held is free.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from pipeline.serve.books.database import why
from pipeline.serve.books.keys import Key
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.books.use_rows import UseRows
from pipeline.serve.books.uses import Earlier, Most

log = logging.getLogger(__name__)

SIGN_S = 5.0
"""How often a process says that it lives."""
_NUM_THREADS = 4


class SharedUses:
    """Processes over the same books grant a limit once between them.

    Minutes pass by the clocks of their machines, which should agree to a second.
    """

    def __init__(
        self, books: Engine, ledger: Ledger, now_s: Callable[[], float] = time.time
    ) -> None:
        """Use it in `living`."""
        self._rows = UseRows(books, now_s)
        self._earlier = Earlier(ledger)
        # Who waits for a key's lock does not keep other work from a thread.
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="limits")
        self._held: set[str] = set()
        """Requests that the books do not know as ended."""
        self._unsaid: dict[str, dict[str, Any]] = {}
        """What the books could not be told of requests."""

    @contextlib.asynccontextmanager
    async def living(self) -> AsyncIterator[None]:
        """Meanwhile, what this process holds counts."""
        await self.sign()
        telling = asyncio.create_task(self._tell())
        try:
            yield
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            with contextlib.suppress(SQLAlchemyError):  # then its lease ends by itself
                await self._run(self._rows.note, dict(self._unsaid))
                await self._run(self._rows.leave)
            self._threads.shutdown(wait=False)

    async def begin(self, use_id: str, key: Key) -> None:
        """Take a place among the requests of the minute, and among those under way."""
        try:
            await self._run(self._rows.begin, use_id, key)
        except asyncio.CancelledError:  # it may be there all the same
            await self._note(use_id, ended_ms=self._rows.now_ms)
            raise
        self._held.add(use_id)

    async def reserve(self, use_id: str, key: Key, most: Most) -> None:
        """Tokens and money, both or none."""
        if key.limit_picodollars is not None or key.tokens_per_minute is not None:
            of_money = key.limit_picodollars is not None
            earlier = await self._earlier.cost(key, most) if of_money else 0
            await self._run(self._rows.reserve, use_id, key, most, earlier)
        elif use_id not in self._held:
            await self._note(use_id, ended_ms=None)
        self._held.add(use_id)

    async def settle(self, use_id: str, key: Key, tokens: int, cost: int) -> None:  # noqa: ARG002
        """The books have its cost, or are about to: until then this row has it."""
        if use_id in self._held:
            self._held.discard(use_id)
            used = {"tokens": tokens, "cost_picodollars": cost}
            await self._note(use_id, **used, ended_ms=self._rows.now_ms)

    async def end(self, use_id: str, key: Key) -> None:
        """Leave its place to the next, unless it has done so with its reply."""
        await self.settle(use_id, key, 0, 0)

    async def sign(self) -> None:
        """Say that this process lives, and what was left unsaid."""
        unsaid = dict(self._unsaid)
        await self._run(self._rows.note, unsaid)
        for use_id, columns in unsaid.items():
            if self._unsaid[use_id] is columns:
                del self._unsaid[use_id]
        await self._run(self._rows.say_alive)
        await self._run(self._rows.forget)

    async def _note(self, use_id: str, **columns: Any) -> None:
        """A request that is over is not held up, nor failed, by books that are away."""
        try:
            await self._run(self._rows.note, {use_id: columns})
        except SQLAlchemyError as error:
            log.warning("limits are told later what a request has used: %s", why(error))
            self._unsaid[use_id] = self._unsaid.get(use_id, {}) | columns

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(SIGN_S)
            try:
                await self.sign()
            except SQLAlchemyError as error:
                log.warning("the books are not told that this server lives: %s", why(error))

    async def _run(self, work: Callable[..., None], *words: Any) -> None:
        """To its end also for a request that is cancelled: what it says next must come after."""
        doing = asyncio.get_running_loop().run_in_executor(self._threads, work, *words)
        try:
            await asyncio.shield(doing)
        except asyncio.CancelledError:
            await asyncio.wait([doing])
            doing.exception()  # nobody else looks at it
            raise
