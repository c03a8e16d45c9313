"""`pipeline serve` as a process that the soak starts, looks into and ends."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from pipeline.errors import PipelineError

_READY_S = 120
GRACE_S = 10
"""Of `pipeline serve`: so long may running replies take after the signal to stop."""
_MORE_S = 10
"""For what comes after that: the engine's end, and the last rows."""


@dataclass(frozen=True)
class Server:
    """One that answers."""

    process: asyncio.subprocess.Process
    url: str
    first_key: str | None
    """None if its books had one already."""

    @property
    def resident_mib(self) -> float:
        """Of its own, without the engine's."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    def children(self) -> Sequence[psutil.Process]:
        """What it has started, engines above all."""
        return list(psutil.Process(self.process.pid).children(recursive=True))

    async def end(self, number: signal.Signals) -> int | None:
        """Its exit code; None if it has not ended within its grace period."""
        self.process.send_signal(number)
        with suppress(TimeoutError):
            return await asyncio.wait_for(self.process.wait(), GRACE_S + _MORE_S)
        return None


@asynccontextmanager
async def serving(
    models: Sequence[Any], folder: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Server]:
    """Models of a serve file, with books and all else that is written in a folder."""
    async with starting(models, folder, environment) as process:
        said = await asyncio.wait_for(_read_start(process), _READY_S)
        yield Server(process, said["serving at"], said.get("key"))


@asynccontextmanager
async def starting(
    models: Sequence[Any], folder: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The same before it answers, if it ever does."""
    menu = folder / "serve.yaml"
    menu.write_text(json.dumps({"models": models}), encoding="utf-8")
    command = ["serve", str(menu), "--port", "0", "--books", str(books_of(folder))]
    own = {"XDG_STATE_HOME": str(folder), "TMPDIR": str(folder), **(environment or {})}
    with log_of(folder).open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pipeline", *command),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, **own},
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@asynccontextmanager
async def scripted(name: str = "soak_engine", *words: str) -> AsyncIterator[str]:
    """The address of an engine that is one of the modules beside this one; it ends with this."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        number = listener.fileno()
        command = (sys.executable, "-m", f"pipeline.bench.{name}", str(number), *words)
        process = await asyncio.create_subprocess_exec(*command, pass_fds=[number])
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield url
    finally:
        process.kill()
        await process.wait()


async def fetch(engine: str, path: str) -> Any:
    """What a scripted engine tells of itself."""
    async with aiohttp.ClientSession() as session, session.get(engine + path) as response:
        return await response.json(content_type=None)


async def set_step(engine: str, step_s: float) -> None:
    """The time that a scripted engine takes from one word to the next."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{engine}/step", data=str(step_s)) as response,
    ):
        response.raise_for_status()


def books_of(folder: Path) -> Path:
    """Of the servers in a folder."""
    return folder / "books.sqlite"


def log_of(folder: Path) -> Path:
    """What they say."""
    return folder / "serve.log"


async def _read_start(process: asyncio.subprocess.Process) -> dict[str, str]:
    assert process.stdout is not None
    said: dict[str, str] = {}
    while "serving at" not in said:
        line = (await process.stdout.readline()).decode()
        if not line:
            raise PipelineError("the soak's server did not start; `pipeline serve` says why")
        if found := re.match(r"(serving at|key) (\S+)", line):
            said[found[1]] = found[2]
    return said
