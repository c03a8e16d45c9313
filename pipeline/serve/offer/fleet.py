"""The engines of a server: as many as its menu needs, each started once and closed when unused."""

import asyncio
import ctypes
import hashlib
import math
import sys
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from pipeline.chat import Chat, template_text
from pipeline.engine.protocol import Engine
from pipeline.engine.supervisor import Supervisor
from pipeline.serve.offer.catalog import Served
from pipeline.serve.offer.door import Door
from pipeline.serve.offer.engines import EngineSetup, start_engine
from pipeline.serve.offer.entries import Entry

Starter = Callable[[EngineSetup, asyncio.Future[Chat]], Awaitable[Engine]]
Requests = Collection[asyncio.Task[Any]]


@dataclass(frozen=True)
class _Running:
    engine: Engine
    chat: Chat
    door: Door = field(default_factory=Door)


class Fleet:
    """Every engine that runs: use `async with`, and `let_go` when the models found are on offer."""

    def __init__(self, start: Starter = start_engine, num_sharing: int = 1) -> None:
        """`num_sharing` processes have the same engines, each a part of their slots and queues."""
        self._start = start
        self._num_sharing = num_sharing
        self._running: dict[Hashable, _Running] = {}
        self._unused: list[Engine] = []
        self._leaving: dict[asyncio.Task[None], Engine] = {}
        self._chats: WeakValueDictionary[str, Chat] = WeakValueDictionary()

    async def __aenter__(self) -> "Fleet":
        """Nothing runs yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()

    async def take_up(self, wanted: Sequence[tuple[Entry, EngineSetup]]) -> list[Served]:
        """Models, on engines that run already and on such as are started now.

        If one does not start, those that have are closed again, and nothing has changed.
        """
        running: dict[Hashable, _Running] = {}
        models: list[Served] = []
        try:
            # One by one: two that load at once would each count on the memory that both see free.
            for entry, setup in wanted:
                if setup.key not in running:
                    running[setup.key] = await self._find(entry, setup)
            for entry, setup in wanted:
                found = running[setup.key]
                models += entry.serve(setup, found.chat, found.engine, found.door)
        except BaseException:
            await _close(running[key].engine for key in running.keys() - self._running.keys())
            raise
        for entry, setup in wanted:
            sizes = (entry.max_inside(setup), setup.slots)
            running[setup.key].door.resize(*map(self._share, sizes))
        unused = self._running.keys() - running.keys()
        self._unused += [self._running[key].engine for key in unused]
        self._running = running
        _give_back_memory()
        return models

    def let_go(self, requests: Requests) -> None:
        """Close the engines of models that are on offer no more, once these requests have ended."""
        for engine in self._unused:
            _drain(engine)
            closing = asyncio.create_task(_close_after(engine, requests))
            self._leaving[closing] = engine
            closing.add_done_callback(self._leaving.pop)
        self._unused = []

    def drain(self) -> None:
        """What is running may go on; an engine that dies now stays dead."""
        for running in self._running.values():
            _drain(running.engine)

    async def close(self) -> None:
        """End them all; twice does no harm."""
        leaving = dict(self._leaving)
        for closing in leaving:
            closing.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        running = (found.engine for found in self._running.values())
        await _close([*running, *self._unused, *leaving.values()])

    def _share(self, number: int | None) -> int | None:
        return number and math.ceil(number / self._num_sharing)

    async def _find(self, entry: Entry, setup: EngineSetup) -> _Running:
        """Reading a tokenizer takes a second, in which an engine loads its model."""
        folder = entry.artefact.folder
        if kept := self._running.get(setup.key):
            return replace(kept, chat=await self._read_chat(folder))
        reading = asyncio.ensure_future(self._read_chat(folder))
        starting = asyncio.ensure_future(self._start(setup, reading))
        try:
            chat = await reading  # a broken tokenizer is the clearer fault, so it is told first
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            raise
        return _Running(await starting, chat)

    async def _read_chat(self, folder: Path) -> Chat:
        """Models of one family have one tokenizer, of a hundred megabytes when it is loaded."""
        dialogue = await asyncio.to_thread(_hash_dialogue, folder)
        chat = self._chats.get(dialogue)
        if chat is None:
            self._chats[dialogue] = chat = await asyncio.to_thread(Chat, folder)
        return chat


def _hash_dialogue(folder: Path) -> str:
    text = template_text(folder).encode()
    return hashlib.sha256(text + (folder / "tokenizer.json").read_bytes()).hexdigest()


def _drain(engine: Engine) -> None:
    if isinstance(engine, Supervisor):
        engine.drain()


async def _close_after(engine: Engine, requests: Requests) -> None:
    if requests:
        await asyncio.wait(requests)
    await engine.close()


async def _close(engines: Iterable[Engine]) -> None:
    await asyncio.gather(*(engine.close() for engine in engines))


def _give_back_memory() -> None:
    """What reading a tokenizer has freed, tens of megabytes, glibc would keep."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
