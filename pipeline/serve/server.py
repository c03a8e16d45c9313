"""`pipeline serve`: engines started and warmed, HTTP on a port, and a clean stop."""

import asyncio
import contextlib
import functools
import ipaddress
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from pipeline.errors import PipelineError
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys, first_key
from pipeline.serve.books.ledger import Ledger, open_ledger
from pipeline.serve.control import obeying
from pipeline.serve.monitoring.traces import Traces, open_traces
from pipeline.serve.offer.catalog import Catalog, Served
from pipeline.serve.offer.entries import read_entries
from pipeline.serve.offer.fleet import Fleet
from pipeline.serve.offer.menu import Menu
from pipeline.serve.offer.offering import Offering
from pipeline.serve.receiving import BoundedProtocol
from pipeline.serve.schema.reply import ChatStyle
from pipeline.serve.settings import Settings, read_target

log = logging.getLogger(__name__)

PORT = 8000
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DROPPED_S = 1  # for what has not ended within the grace period to notice that it is cut


Ready = Callable[[str, str | None, Sequence[Served]], None]
"""Told the base URL once the first request can be answered, the key if a first was made, and the
models."""


def serve(path: Path, settings: Settings, ready: Ready) -> None:
    """Serve a run, a checkpoint, a .gguf file or a serve file's models until SIGINT or SIGTERM.

    Call it in the main thread. Raises GateMissed for an artefact whose certificate says that it is
    not the model as trained.
    """
    menu = check(path, settings)
    port = next((port for port in (settings.port, menu.port) if port is not None), PORT)
    with (
        _listen(settings.host, port) as listener,
        open_books(settings.books or menu.books) as books,
        open_ledger(books) as ledger,
        open_traces() as traces,
        # Half of asyncio's own time for every event of a stream.
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        style = ChatStyle(menu.usage_chunk, has_reasoning_content=settings.is_provider)
        keys = _who_may_ask(Keys(books), settings)
        serving = _Serving(path, settings, keys, ledger, style, traces)
        runner.run(serving.run(listener, ready))


def check(path: Path, settings: Settings) -> Menu:
    """What is to be served; PipelineError, or GateMissed, for what cannot or must not be."""
    menu = read_target(path, settings)
    read_entries(menu)
    return menu


def _who_may_ask(keys: Keys, settings: Settings) -> Keys | None:
    """None is everybody; PipelineError where others might come before there is any key."""
    if settings.is_open:
        log.warning("%s is open: everybody who can reach it is answered", settings.host)
        return None
    if not _is_loopback(settings.host) and not keys.has_usable():
        raise PipelineError(
            f"other machines may reach {settings.host}, and there is no key yet: make one by "
            "pipeline keys create --name NAME, or let everybody in by --open"
        )
    return keys


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@dataclass(frozen=True)
class _Serving:
    """One server's life."""

    path: Path
    settings: Settings
    keys: Keys | None
    """None lets everybody in."""
    ledger: Ledger
    style: ChatStyle
    traces: Traces | None = None

    async def run(self, listener: socket.socket, ready: Ready) -> None:
        """Until a signal comes; while the engines start, it stops that."""
        starting = asyncio.current_task()
        assert starting is not None
        try:
            await self._serve(listener, ready, starting)
        finally:
            _leave_signals()

    async def _serve(
        self, listener: socket.socket, ready: Ready, starting: asyncio.Task[Any]
    ) -> None:
        _on_signals(starting.cancel)
        catalog, fleet = Catalog([]), Fleet()
        app = App(catalog, self.keys, self.ledger, style=self.style, traces=self.traces)
        server = _Server(configure(app))
        read = functools.partial(read_target, self.path, self.settings)
        requests = server.server_state.tasks
        offering = Offering(self.path, read, catalog, fleet, lambda: requests)
        host, port = listener.getsockname()[:2]
        with contextlib.suppress(asyncio.CancelledError):
            async with fleet, contextlib.AsyncExitStack() as closing:
                closing.push_async_callback(app.close)
                await offering.begin()
                stop = _Stop(server, catalog, fleet, self.settings.grace_s)
                _on_signals(stop.begin)
                async with obeying(port, offering.reload), _alongside(offering.watch()):
                    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/api/v1"
                    key = first_key(self.keys) if self.keys else None
                    ready(url, key, catalog.models)
                    await server.serve(sockets=[listener])


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Take the port first: a model is not loaded for a port that is not free.

    A port is only taken by listening; two may bind it. A connection waits until we are ready.
    """
    # asyncio switches Nagle's delay off only where the protocol is named: 40 ms of every response.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
        except (OSError, OverflowError) as error:
            raise PipelineError(
                f"cannot listen on {host}:{port}: {error}; choose another port or host"
            ) from error
        yield listener


@contextlib.asynccontextmanager
async def _alongside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Meanwhile, and no longer."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _on_signals(action: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, action)


def _leave_signals() -> None:
    """uvloop would keep them for a loop that has ended, and Ctrl-C would do nothing."""
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.remove_signal_handler(number)


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


class _Stop:
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
