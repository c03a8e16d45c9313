"""`pipeline serve`: the engine started and warmed, HTTP on a port, and a clean stop."""

import asyncio
import contextlib
import ctypes
import logging
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from pipeline.chat import Chat
from pipeline.engine.choose import EngineChoice, choose_engine
from pipeline.engine.protocol import Engine
from pipeline.engine.supervisor import Supervisor
from pipeline.errors import PipelineError
from pipeline.serve.app import App
from pipeline.serve.artefact import Artefact, Load, find_artefact, load
from pipeline.serve.books import open_books
from pipeline.serve.catalog import Catalog, Served
from pipeline.serve.choice import Choice, refuse_uncertified
from pipeline.serve.engines import Room, join_engines, start_engine
from pipeline.serve.keys import Keys, first_key
from pipeline.serve.ledger import Ledger

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DROPPED_S = 1  # for what has not ended within the grace period to notice that it is cut


@dataclass(frozen=True)
class Settings:
    """Where to listen, and what to run."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 is any free one."""
    engine: str = "auto"
    """auto, llamacpp, vllm, or URLs, with commas between, of servers with the same model loaded."""
    artefact: Choice = "auto"
    """Which of a run's artefacts is served."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Put on what is served, by the slugs of the models they make."""
    model: str = ""
    """What clients call what is served, AUTHOR/SLUG; by default local/ and the folder's name."""
    room: Room = field(default_factory=Room)
    """Of an engine of ours."""
    books: str | None = None
    """Of keys and generations, as `open_books` has it."""
    grace_s: int = 10
    """How long running replies may take after the signal to stop."""


Ready = Callable[[str, str | None], None]
"""Told the base URL once the first request can be answered, and the key if a first was made."""


def serve(path: Path, settings: Settings, ready: Ready) -> None:
    """Serve a run, a checkpoint or a .gguf file until SIGINT or SIGTERM; call in the main thread.

    Raises GateMissed for an artefact whose certificate says that it is not the model as trained.
    """
    chosen, artefact = find(path, settings)
    if artefact.chosen.why:
        log.info(artefact.chosen.why)
    with _listen(settings) as listener, open_books(settings.books) as books:
        # Before the loop runs: making a GGUF file takes minutes, and is stopped by any signal.
        files = None if chosen.urls else load(artefact, settings.adapters, chosen.kind)
        serving = _Serving(artefact, settings, chosen, files)
        with (
            contextlib.closing(Ledger(books)) as ledger,
            # Half of asyncio's own time for every event of a stream.
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(serving.run(listener, Keys(books), ledger, ready))


def find(path: Path, settings: Settings) -> tuple[EngineChoice, Artefact]:
    """Which engine serves what; PipelineError, or GateMissed, for what cannot or must not be."""
    chosen = choose_engine(settings.engine, is_gguf=path.suffix == ".gguf")
    if chosen.why:
        log.info("engine %s, for %s", chosen.kind, chosen.why)
    for option, value in (
        ("artefact", settings.artefact != "auto"),
        ("adapter", settings.adapters),
    ):
        if value and chosen.urls:
            raise PipelineError(f"--{option} is not for {settings.engine}, which has its model")
    if settings.model and not re.fullmatch(r"[\w.-]+/[\w.-]+", settings.model):
        raise PipelineError(f"--model {settings.model}: give AUTHOR/SLUG")
    artefact = find_artefact(path, settings.artefact, chosen.kind)
    if (settings.model or artefact.slug) in settings.adapters:
        raise PipelineError(f"two models would be called {settings.model or artefact.slug}")
    refuse_uncertified(artefact.folder, artefact.chosen)
    return chosen, artefact


@dataclass(frozen=True)
class _Serving:
    """One server's life."""

    artefact: Artefact
    settings: Settings
    chosen: EngineChoice
    files: Load | None
    """None if the engines are elsewhere."""

    async def run(self, listener: socket.socket, keys: Keys, ledger: Ledger, ready: Ready) -> None:
        """Until a signal comes; while the engine starts, it stops that."""
        starting = asyncio.current_task()
        assert starting is not None
        _on_signals(starting.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            async with self._started() as (chat, engine):
                _give_back_memory()
                catalog = Catalog(self._served(chat, engine))
                server = _Server(_configure(App(catalog, keys, ledger)))
                stop = _Stop(server, catalog, engine, self.settings.grace_s)
                _on_signals(stop.begin)
                host, port = listener.getsockname()[:2]
                ready(f"http://{host}:{port}/api/v1", first_key(keys))
                await server.serve(sockets=[listener])

    @contextlib.asynccontextmanager
    async def _started(self) -> AsyncIterator[tuple[Chat, Engine]]:
        """Reading a tokenizer takes a second, in which the engine loads its model."""
        reading = asyncio.ensure_future(asyncio.to_thread(Chat, self.artefact.folder))
        starting = asyncio.create_task(self._start_engine(reading))
        try:
            chat = await reading  # a broken tokenizer is the clearer fault, so it is told first
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            raise
        engine = await starting
        try:
            yield chat, engine
        finally:
            await engine.close()

    async def _start_engine(self, chat: asyncio.Future[Chat]) -> Engine:
        if self.files is None:
            return await join_engines(self.chosen.urls, chat)
        kind, run = self.chosen.kind, self.artefact.run
        return await start_engine(kind, self.files, self.settings.room, chat, run)

    def _served(self, chat: Chat, engine: Engine) -> list[Served]:
        """What lies at the path, by itself or as its own adapter makes it; then the others."""
        slug = self.settings.model or self.artefact.slug
        own = self.artefact.slug if self.files and self.artefact.chosen.adapter else None
        file = self.files.weights if self.files else self.artefact.tokenizer
        created = int(file.stat().st_mtime)
        engine_name = self.chosen.kind if self.files else "url"
        names = {slug: own} | {other: other for other in self.settings.adapters}
        return [
            Served(name, chat, engine, created, adapter, author, engine_name)
            for (author, _, name), adapter in ((s.partition("/"), a) for s, a in names.items())
        ]


def _give_back_memory() -> None:
    """What reading a tokenizer has freed, tens of megabytes, glibc would keep."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _listen(settings: Settings) -> Iterator[socket.socket]:
    """Take the port first: a model is not loaded for a port that is not free.

    A port is only taken by listening; two may bind it. A connection waits until we are ready.
    """
    # asyncio switches Nagle's delay off only where the protocol is named: 40 ms of every response.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
            listener.listen()
        except (OSError, OverflowError) as error:
            raise PipelineError(
                f"cannot listen on {settings.host}:{settings.port}: {error}; choose another port"
            ) from error
        yield listener


def _on_signals(action: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, action)


def _configure(app: App) -> uvicorn.Config:
    return uvicorn.Config(
        app,
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

    def __init__(self, server: _Server, catalog: Catalog, engine: Engine, grace_s: float) -> None:
        self._server = server
        self._catalog = catalog
        self._engine = engine
        self._grace_s = grace_s
        self._again = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """The second time, running replies are dropped."""
        if self._draining is not None:
            self._again.set()
            return
        self._catalog.is_draining = True
        if isinstance(self._engine, Supervisor):
            self._engine.drain()
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
                await self._engine.close()  # each is told that its engine has gone
                await asyncio.wait({ending}, timeout=_DROPPED_S)
        self._server.should_exit = True
