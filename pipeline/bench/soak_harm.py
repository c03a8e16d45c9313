"""What is done to a server at random while it answers."""

import asyncio
import random
import resource
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.bench.soak_server import Server, books_of

_FULL_BYTES = 64 * 1024
"""No file may grow further on the disk that is full: the spool's first rows have room."""
JUMPS_S = (90_000, -90_000, 3600, 0)
"""From the true time: past midnight, back before it, an hour ahead, and right again."""
Harm = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Clock:
    """The time that a server sees; libfaketime, Debian's package, makes it."""

    file: Path
    """Says how many seconds it is away from the true one."""

    @property
    def library(self) -> Path | None:
        """None where it is not installed."""
        return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)

    @property
    def environment(self) -> Mapping[str, str]:
        """Of the server."""
        if self.library is None:
            return {}
        self.jump(0)
        return {
            "LD_PRELOAD": str(self.library),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DISABLE_SHM": "1",
        }

    def jump(self, seconds: int) -> None:
        """To so many seconds from the true time."""
        new = self.file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n", encoding="utf-8")
        new.replace(self.file)


@dataclass(frozen=True)
class Harms:
    """All of them, to one server."""

    server: Server
    folder: Path
    dice: random.Random
    pause_s: tuple[float, float] = (1.0, 4.0)
    """Between two."""

    async def do(self, seconds: float) -> Counter[str]:
        """One at a time, and each at least once; how often each was done."""
        done, clock = Counter[str](), asyncio.get_running_loop().time
        end_s, kinds = clock() + seconds, self.kinds
        while True:
            for name in self.dice.sample(sorted(kinds), len(kinds)):
                if clock() >= end_s and len(done) == len(kinds):
                    return done
                await kinds[name]()
                done[name] += 1
                await asyncio.sleep(self.dice.uniform(*self.pause_s))

    @property
    def kinds(self) -> dict[str, Harm]:
        """By their names."""
        return {
            "engine killed": self._kill_engine,
            "books locked": self._lock_books,
            "disk full": self._fill_disk,
        }

    async def _kill_engine(self) -> None:
        for child in self.server.children():
            with suppress(psutil.NoSuchProcess):
                child.kill()

    async def _lock_books(self) -> None:
        """For less than a write waits, or for more."""
        with closing(sqlite3.connect(books_of(self.folder), timeout=1)) as books:
            books.execute("BEGIN EXCLUSIVE")
            await asyncio.sleep(self.dice.uniform(2, 8))
            books.rollback()

    async def _fill_disk(self) -> None:
        process = psutil.Process(self.server.process.pid)
        before = process.rlimit(resource.RLIMIT_FSIZE)
        process.rlimit(resource.RLIMIT_FSIZE, (_FULL_BYTES, before[1]))
        await asyncio.sleep(self.dice.uniform(2, 6))
        process.rlimit(resource.RLIMIT_FSIZE, before)


def orphans(children: Sequence[psutil.Process]) -> list[str]:
    """Those that still run."""
    return [f"process {child.pid}" for child in children if child.is_running() and _lives(child)]


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
