"""`pipeline serve --workers N`: one process starts the engines, and several answer over them."""

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from pipeline.engine.child import python_path
from pipeline.engine.supervisor import CALM_S, backoff_s
from pipeline.errors import PipelineError
from pipeline.serve.control import obeying
from pipeline.serve.gateway import doing, on_signals, signals_heeded
from pipeline.serve.monitoring.metrics import Metrics
from pipeline.serve.monitoring.pages import Pages
from pipeline.serve.offer.catalog import Catalog, Served
from pipeline.serve.offer.engines import start_engine
from pipeline.serve.offer.fleet import Fleet, Requests
from pipeline.serve.offer.offering import Offering
from pipeline.serve.settings import Settings, read_target

log = logging.getLogger(__name__)

_MARGIN_S = 10  # for a worker to end after its grace period
START_TIMEOUT_S = 120
"""A worker reads tokenizers and joins engines that run already."""


@dataclass(frozen=True)
class Post:
    """What a worker is told of its work, as its first line."""

    number: int
    path: Path
    settings: Settings
    port: int
    folder: Path
    """Where the engines are found, and pages of metrics."""

    def packed(self) -> bytes:
        """For a program of this very version."""
        return pickle.dumps(self).hex().encode() + b"\n"


class Crew:
    """The process that starts the engines, and the workers that answer over them."""

    def __init__(self, path: Path, settings: Settings, listener: socket.socket) -> None:
        """The listener is one of `share`, whose port the workers join."""
        self._path = path
        self._settings = settings
        self._port = listener.getsockname()[1]
        self._catalog = Catalog([])
        self._workers: list[_Worker] = []
        self._metrics = Metrics()
        self._stopping = asyncio.Event()

    async def run(self, ready: Callable[[Sequence[Served]], None]) -> None:
        """Until a signal comes; while engines and workers start, it stops that."""
        with signals_heeded(), _folder() as folder, contextlib.suppress(asyncio.CancelledError):
            start = functools.partial(start_engine, links=folder)
            read = functools.partial(read_target, self._path, self._settings)
            async with Fleet(start) as fleet, contextlib.AsyncExitStack() as closing:
                offering = Offering(self._path, read, self._catalog, fleet, self._follow)
                await offering.begin()
                closing.push_async_callback(self._end)
                posts = [
                    Post(number, self._path, self._settings, self._port, folder)
                    for number in range(self._settings.workers)
                ]
                await self._start(posts)
                on_signals(functools.partial(self._stop, fleet))
                pages = Pages(folder, "engines").keep(self._page)
                async with (
                    obeying(self._port, offering.reload),
                    doing(offering.watch()),
                    doing(pages),
                ):
                    ready(self._catalog.models)
                    await asyncio.gather(*map(self._keep, range(len(self._workers))))

    async def _page(self) -> bytes:
        """Of the engines, which a worker sees from outside only."""
        return await self._metrics.page(self._catalog, None)

    async def _start(self, posts: Sequence[Post]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                starting = [group.create_task(_Worker.start(post)) for post in posts]
        except* PipelineError as errors:
            raise errors.exceptions[0] from None
        self._workers = [task.result() for task in starting]

    async def _follow(self) -> Requests:
        """What is on offer has changed: every worker reads it; replies go on as they began."""
        alive = [worker.reload() for worker in self._workers if worker.is_alive]
        told = await asyncio.gather(*alive, return_exceptions=True)
        for failure in told:
            if isinstance(failure, BaseException):
                raise failure
        return [over for over in told if not isinstance(over, BaseException)]

    async def _keep(self, number: int) -> None:
        """A worker that dies has a successor, until the server is to stop."""
        num_failures = 0
        while not self._stopping.is_set():
            begun_s = asyncio.get_running_loop().time()
            await self._workers[number].wait()
            if self._stopping.is_set():
                return
            log.error("worker %d has died and is started again", number)
            is_calm = asyncio.get_running_loop().time() - begun_s > CALM_S
            num_failures = 0 if is_calm else num_failures + 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s(num_failures))
                return
            with contextlib.suppress(PipelineError):  # it is dead again, which is seen above
                self._workers[number] = await self._workers[number].succeed()

    def _stop(self, fleet: Fleet) -> None:
        """The second time, running replies are dropped."""
        self._stopping.set()
        self._catalog.is_draining = True
        fleet.drain()
        for worker in self._workers:
            worker.send(signal.SIGTERM)

    async def _end(self) -> None:
        """They have ended, unless something went wrong here."""
        for worker in self._workers:
            if worker.is_alive:
                worker.send(signal.SIGTERM)
        await asyncio.gather(*(worker.end() for worker in self._workers))


class _Worker:
    """One of them, and the line to it: if that breaks, the worker stops by itself."""

    def __init__(self, post: Post, process: asyncio.subprocess.Process) -> None:
        """Not for callers: `start` also waits until it answers."""
        self._post = post
        self._process = process
        self._numbers = itertools.count()
        self._awaited: dict[tuple[str, int], asyncio.Future[Any]] = {}
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._listening: asyncio.Task[None]

    @classmethod
    async def start(cls, post: Post) -> "_Worker":
        """PipelineError if it does not come to answer."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "pipeline", "worker"),
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Ctrl-C in a terminal reaches a whole group; we decide when a worker ends.
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": python_path()},
            )
        worker = cls(post, process)
        worker._reader, worker._writer = await asyncio.open_unix_connection(sock=ours)
        worker._listening = asyncio.create_task(worker._listen())
        worker._writer.write(post.packed())
        try:
            await asyncio.wait_for(worker._await("ready", 0), START_TIMEOUT_S)
        except BaseException as error:
            worker.send(signal.SIGKILL)
            await worker.end()
            if isinstance(error, TimeoutError):
                raise PipelineError(f"a worker did not start in {START_TIMEOUT_S} s") from error
            raise
        return worker

    @property
    def is_alive(self) -> bool:
        """As far as is known."""
        return self._process.returncode is None

    async def succeed(self) -> "_Worker":
        """Another in its place."""
        await self.end()
        return await self.start(self._post)

    async def wait(self) -> None:
        """Until it has ended."""
        await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def reload(self) -> "asyncio.Task[None]":
        """Let it read its models again; the task is over when replies begun before have ended.

        PipelineError is its own.
        """
        number = next(self._numbers)
        self._writer.write(b"%d\n" % number)
        over = asyncio.create_task(self._await_end(number))
        if failure := await self._await("read", number):
            raise PipelineError(failure)
        return over

    async def end(self) -> None:
        """Wait for it, and kill it if it takes longer than replies may."""
        try:
            await asyncio.wait_for(self.wait(), self._post.settings.grace_s + _MARGIN_S)
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self.wait()
        self._writer.close()
        await self._listening

    async def _await_end(self, number: int) -> None:
        with contextlib.suppress(PipelineError):  # a dead worker has no replies
            await self._await("over", number)

    async def _await(self, what: str, number: int) -> Any:
        future = self._awaited[what, number] = asyncio.get_running_loop().create_future()
        if self._listening.done():
            future.set_exception(PipelineError("a worker has died; the log says why"))
        return await future

    async def _listen(self) -> None:
        """A line is what has happened, to which request of ours, and more."""
        with contextlib.suppress(ConnectionError):
            async for line in self._reader:
                what, number, more = orjson.loads(line)
                if future := self._awaited.pop((what, number), None):
                    future.set_result(more)
        for future in self._awaited.values():
            if not future.done():
                future.set_exception(PipelineError("a worker has died; the log says why"))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Its path is short: that of a socket has to be."""
    folder = Path(tempfile.mkdtemp(prefix="pipeline-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
