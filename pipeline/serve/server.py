"""`pipeline serve`: the engine started and warmed, HTTP on a port, and a clean stop."""

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from pipeline.chat import Chat
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.protocol import Engine, Sampling
from pipeline.errors import EngineError, PipelineError
from pipeline.serve.app import App
from pipeline.serve.catalog import Artefact, Catalog, Served, find_artefact

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Settings:
    """Where to listen, and what to run."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 is any free one."""
    engine: str = "llamacpp"
    """llamacpp, or the URL of a llama.cpp server that has the same model loaded."""
    slots: int = 4
    """Replies made at once; further requests wait for one of them."""
    context_tokens: int = 8192
    """Room of each slot, prompt and completion together; at most the model's own."""
    grace_s: int = 10
    """How long running replies may take after the signal to stop."""


def serve(path: Path, settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve a run folder or a .gguf file until SIGINT or SIGTERM; call in the main thread.

    `ready` is told the base URL once the first request can be answered.
    """
    artefact = find_artefact(path)
    with _listen(settings) as listener:
        asyncio.run(_serve(artefact, settings, listener, ready))


@contextlib.contextmanager
def _listen(settings: Settings) -> Iterator[socket.socket]:
    """Take the port first: a model is not loaded for a port that is not free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except (OSError, OverflowError) as error:
            raise PipelineError(
                f"cannot listen on {settings.host}:{settings.port}: {error}; choose another port"
            ) from error
        yield listener


async def _serve(
    artefact: Artefact, settings: Settings, listener: socket.socket, ready: Callable[[str], None]
) -> None:
    chat = Chat(artefact.folder)
    created = int(artefact.gguf.stat().st_mtime)
    starting = asyncio.current_task()
    assert starting is not None
    _on_signals(starting.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        async with _engine(artefact, settings) as engine:
            await _warm_up(engine, chat)
            served = Served(artefact.name, chat, engine, created)
            server = _Server(_configure(App(Catalog([served])), settings))
            _on_signals(server.stop)
            # From here on a connection waits to be accepted; before, it was refused.
            listener.listen()
            host, port = listener.getsockname()[:2]
            ready(f"http://{host}:{port}/api/v1")
            await server.serve(sockets=[listener])


def _on_signals(action: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, action)


@contextlib.asynccontextmanager
async def _engine(artefact: Artefact, settings: Settings) -> AsyncIterator[Engine]:
    """The engine for as long as it is needed; its log is kept only if something failed."""
    if settings.engine.startswith(("http://", "https://")):
        async with await LlamaCpp.at(settings.engine) as engine:
            yield engine
        return
    if settings.engine != "llamacpp":
        raise PipelineError(f"engine {settings.engine!r} is unknown: give llamacpp or a URL")
    handle, name = tempfile.mkstemp(prefix="llamacpp-", suffix=".log")
    os.close(handle)
    log, failed = Path(name), False
    try:
        async with await LlamaCpp.start(
            artefact.gguf, slots=settings.slots, context_tokens=settings.context_tokens, log=log
        ) as engine:
            yield engine
    except EngineError:
        failed = True
        raise
    finally:
        if not failed:
            log.unlink()


async def _warm_up(engine: Engine, chat: Chat) -> None:
    """One tiny reply, so that the first client does not pay for what is done once."""
    prompt_ids = chat.prompt_ids([{"role": "user", "content": "Hello"}], None, "direct")
    async for _ in engine.generate(prompt_ids, Sampling(max_tokens=1)):
        pass


def _configure(app: App, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=settings.grace_s,
    )


class _Server(uvicorn.Server):
    """uvicorn, with the signals left to us: it would raise them again before the engine ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do not."""
        yield

    def stop(self) -> None:
        """Let running replies end; the second time, drop them."""
        self.force_exit = self.should_exit
        self.should_exit = True
