"""What a server offers, read again when it is told to, or when its serve file has changed."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import EngineDown, PipelineError
from pipeline.serve.offer.catalog import Catalog, Served
from pipeline.serve.offer.engines import EngineSetup
from pipeline.serve.offer.entries import Entry, read_entries
from pipeline.serve.offer.fleet import Fleet, Requests
from pipeline.serve.offer.menu import Menu

log = logging.getLogger(__name__)

CHECK_S = 1.0
T = TypeVar("T")


class Offering:
    """A menu as a catalog, now and later: `begin`, then `reload` as often as you like."""

    def __init__(
        self,
        file: Path,
        read: Callable[[], Menu],
        catalog: Catalog,
        fleet: Fleet,
        requests: Callable[[], Awaitable[Requests]],
    ) -> None:
        """`file` is what `read` reads, and `requests` are those that run once this is on offer."""
        self._file = file
        self._read = read
        self._catalog = catalog
        self._fleet = fleet
        self._requests = requests
        self._seen: bytes | None = None
        self._reloading = asyncio.Lock()

    async def begin(self) -> None:
        """Offer what the menu says; PipelineError, or GateMissed, if that cannot be."""
        self._seen = _content(self._file)
        menu, wanted = await _in_background(self._prepare)
        models = await self._fleet.take_up(wanted)
        self._catalog.models = sorted(models, key=lambda served: served.slug != menu.default)
        self._catalog.presets = menu.presets
        self._fleet.let_go(set(await self._requests()))

    async def reload(self) -> str:
        """Offer what the menu says now: the sentence that says what that is.

        Requests that run go on as they began. PipelineError, and nothing has changed, if a model
        cannot be served or does not start.
        """
        async with self._reloading:
            if self._catalog.is_draining:
                raise EngineDown("the server is about to stop")
            before = self._catalog.models
            try:
                await self.begin()
            except PipelineError as error:
                log.error("not reloaded, and nothing has changed: %s", error)
                raise
            except Exception as error:
                log.exception("not reloaded, and nothing has changed")
                raise PipelineError(
                    f"not reloaded: {error!r}; the server's log has more"
                ) from error
            said = _say(before, self._catalog.models)
            log.info("reloaded: %s", said)
            return said

    async def watch(self) -> None:
        """Reload whenever the file has changed, for ever."""
        while True:
            await asyncio.sleep(CHECK_S)
            found = _content(self._file)
            if found is not None and found != self._seen:
                with contextlib.suppress(PipelineError):  # which the log has told
                    await self.reload()

    def _prepare(self) -> tuple[Menu, Sequence[tuple[Entry, EngineSetup]]]:
        menu = self._read()
        entries = read_entries(menu)
        engines = [f"engine {e.chosen.kind}, for {e.chosen.why}" for e in entries if e.chosen.why]
        choices = [e.artefact.chosen.why for e in entries if e.artefact.chosen.why]
        for why in dict.fromkeys(engines + choices):
            log.info(why)
        return menu, [(entry, entry.set_up()) for entry in entries]


def _content(file: Path) -> bytes | None:
    """None if it is no file, or is not there just now: some editors write by renaming."""
    try:
        return file.read_bytes() if file.suffix in (".yaml", ".yml") else None
    except OSError:
        return None


def _say(before: Sequence[Served], after: Sequence[Served]) -> str:
    old, new = ([served.slug for served in models] for models in (before, after))
    said = f"{', '.join(new)} on offer"
    for word, slugs, others in (("new", new, old), ("gone", old, new)):
        if other := [slug for slug in slugs if slug not in others]:
            said += f"; {word}: {', '.join(other)}"
    return said


async def _in_background(work: Callable[[], T]) -> T:
    """In a thread that a server which stops need not wait for, as it would for asyncio's own."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(how: Callable[[Any], None], value: object) -> None:
        if not done.cancelled():
            how(value)

    def run() -> None:
        how: Callable[[Any], None] = done.set_result
        value: object
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 - it is raised where the work is awaited
            how, value = done.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(tell, how, value)

    threading.Thread(target=run, daemon=True).start()
    return await done
