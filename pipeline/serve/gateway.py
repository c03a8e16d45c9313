"""One process that answers: models on their engines, HTTP on a listener, and a clean stop."""

import asyncio
import contextlib
import functools
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from pipeline.serve.api.app import App
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.books.shared_uses import SharedUses
from pipeline.serve.content.log import ContentLog
from pipeline.serve.monitoring.pages import Pages
from pipeline.serve.monitoring.traces import Traces
from pipeline.serve.offer.catalog import Catalog
from pipeline.serve.offer.fleet import Fleet, Requests
from pipeline.serve.offer.offering import Offering
from pipeline.serve.receiving import BoundedProtocol
from pipeline.serve.schema.reply import ChatStyle
from pipeline.serve.settings import Settings, read_target

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DROPPED_S = 1  # for what has not ended within the grace period to notice that it is cut


@dataclass(frozen=True)
class Running:
    """A gateway that answers."""

    app: App
    offering: Offering
    stop: "Stop"
    requests: Requests
    """Those under way."""


Alongside = Callable[[Running], contextlib.AbstractAsyncContextManager[None]]
"""What is to be done for as long as it does."""


@dataclass(frozen=True)
class Gateway:
    """One server's life."""

    path: Path
    settings: Settings
    keys: Keys | None
    """None lets everybody in."""
    ledger: Ledger
    content_log: ContentLog
    uses: SharedUses | None
    """None where no other process has the same books."""
    style: ChatStyle
    pages: Pages | None = None
    """Of a worker's fellows."""
    traces: Traces | None = None

    async def run(self, listener: socket.socket, fleet: Fleet, alongside: Alongside) -> None:
        """Until a signal comes; while the engines start, it stops that."""
        with signals_heeded():
            await self._run(listener, fleet, alongside)

    async def _run(self, listener: socket.socket, fleet: Fleet, alongside: Alongside) -> None:
        catalog = Catalog([])
        app = App(
            catalog,
            self.keys,
            self.ledger,
            style=self.style,
            uses=self.uses,
            content_log=self.content_log,
            pages=self.pages,
            traces=self.traces,
        )
        server = _Server(configure(app))

        requests = server.server_state.tasks

        async def under_way() -> Requests:
            return requests

        read = functools.partial(read_target, self.path, self.settings)
        offering = Offering(self.path, read, catalog, fleet, under_way)
        with contextlib.suppress(asyncio.CancelledError):
            async with fleet, contextlib.AsyncExitStack() as closing:
                closing.push_async_callback(app.close)
                await offering.begin()
                stop = Stop(server, catalog, fleet, self.settings.grace_s)
                on_signals(stop.begin)
                _spare_what_stays()
                if self.uses:
                    await closing.enter_async_context(self.uses.living())
                async with alongside(Running(app, offering, stop, requests)):
                    await server.serve(sockets=[listener])


def _spare_what_stays() -> None:
    """Have the garbage collector look at what requests leave, and seldom.

    As Python sets it, many at once make it go through every module of the process again and again:
    a tenth of all that they take.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


@contextlib.asynccontextmanager
async def doing(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Meanwhile, and no longer."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.contextmanager
def signals_heeded() -> Iterator[None]:
    """A signal cancels what runs in here, until `on_signals` says otherwise."""
    starting = asyncio.current_task()
    assert starting is not None
    on_signals(starting.cancel)
    try:
        yield
    finally:
        # uvloop would keep them for a loop that has ended, and Ctrl-C would do nothing.
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def on_signals(action: Callable[[], object]) -> None:
    """Do this, and nothing else."""
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, action)


def configure(app: App) -> uvicorn.Config:
    """How HTTP is spoken."""
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=_DROPPED_S,
    )


class _Server(uvicorn.Server):
    """uvicorn, with the signals left to us: it would raise them again before the engine ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do not."""
        yield


class Stop:
    """What a signal does: nothing new begins, running replies end, then the server does."""

    def __init__(self, server: _Server, catalog: Catalog, fleet: Fleet, grace_s: float) -> None:
        self._server = server
        self._catalog = catalog
        self._fleet = fleet
        self._grace_s = grace_s
        self._again = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """The second time, running replies are dropped."""
        if self._draining is not None:
            self._again.set()
            return
        self._catalog.is_draining = True
        self._fleet.drain()
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """The port stays open for it, so that who asks is told to ask again elsewhere."""
        if running := set(self._server.server_state.tasks):
            log.info("%d requests may end first; another signal drops them", len(running))
            ending, again = asyncio.gather(*running), asyncio.ensure_future(self._again.wait())
            either: set[asyncio.Future[Any]] = {ending, again}
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait(either, timeout=self._grace_s, return_when=first)
            again.cancel()
            if not ending.done():
                log.warning("the replies that are still running are dropped")
                await self._fleet.close()  # each is told that its engine has gone
                await asyncio.wait({ending}, timeout=_DROPPED_S)
        self._server.should_exit = True
