"""`pipeline serve`: engines started and warmed, HTTP on a port, and a clean stop."""

import asyncio
import contextlib
import functools
import ipaddress
import logging
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import uvloop

from pipeline.errors import PipelineError
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys, first_key
from pipeline.serve.books.ledger import open_ledger
from pipeline.serve.books.retention import forgetting
from pipeline.serve.books.shared_uses import SharedUses
from pipeline.serve.content.log import open_content_log
from pipeline.serve.control import obeying
from pipeline.serve.crew import Crew
from pipeline.serve.gateway import Gateway, Running, doing
from pipeline.serve.listening import listen, share, url_of
from pipeline.serve.monitoring.traces import open_traces
from pipeline.serve.offer.catalog import Served
from pipeline.serve.offer.entries import read_entries
from pipeline.serve.offer.fleet import Fleet
from pipeline.serve.offer.menu import Menu
from pipeline.serve.schema.reply import ChatStyle
from pipeline.serve.settings import Settings, read_target

log = logging.getLogger(__name__)

PORT = 8000
_MAX_OPEN_FILES = 65536


Ready = Callable[[str, str | None, Sequence[Served]], None]
"""Told the base URL once the first request can be answered, the key if a first was made, and the
models."""


def serve(path: Path, settings: Settings, ready: Ready) -> None:
    """Serve a run, a checkpoint, a .gguf file or a serve file's models until SIGINT or SIGTERM.

    Call it in the main thread. Raises GateMissed for an artefact whose certificate says that it is
    not the model as trained.
    """
    raise_open_files()
    menu = check(path, settings)
    take_port = listen if settings.workers == 1 else share
    port = next((port for port in (settings.port, menu.port) if port is not None), PORT)
    with (
        take_port(settings.host, port) as listener,
        opened(path, settings, menu) as gateway,
        forgetting(settings.books or menu.books, menu.keep_days),
        # Half of asyncio's own time for every event of a stream.
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        if settings.workers > 1:
            crew = Crew(path, settings, listener)
            runner.run(crew.run(lambda models: _tell(listener, gateway.keys, models, ready)))
        else:
            alone = functools.partial(_alone, listener, ready)
            runner.run(gateway.run(listener, Fleet(), alone))


@contextlib.contextmanager
def opened(path: Path, settings: Settings, menu: Menu) -> Iterator[Gateway]:
    """What answers for a menu, with its books open."""
    with (
        open_books(settings.books or menu.books) as books,
        open_ledger(books) as ledger,
        open_content_log(menu.content, books.url) as content_log,
        open_traces() as traces,
    ):
        style = ChatStyle(menu.usage_chunk, has_reasoning_content=settings.is_provider)
        # Somebody else may have a database's books, but those in a file only our own workers.
        is_alone = books.dialect.name == "sqlite" and settings.workers == 1
        uses = None if is_alone else SharedUses(books, ledger)
        keys = _who_may_ask(Keys(books), settings)
        yield Gateway(path, settings, keys, ledger, content_log, uses, style, traces=traces)


@contextlib.asynccontextmanager
async def _alone(listener: socket.socket, ready: Ready, running: Running) -> AsyncIterator[None]:
    """As the only process of a server."""
    offering, app = running.offering, running.app
    async with obeying(listener.getsockname()[1], offering.reload), doing(offering.watch()):
        _tell(listener, app.keys, app.catalog.models, ready)
        yield


def _tell(
    listener: socket.socket, keys: Keys | None, models: Sequence[Served], ready: Ready
) -> None:
    ready(url_of(listener), first_key(keys) if keys else None, models)


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


def raise_open_files() -> None:
    """Each stream has a file to its client and one to its engine, and many systems grant 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if wanted > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        log.info("as many as %d files may be open at once, not %d", wanted, soft)
