"""Many streams at once over a scripted engine, some of whose readers are slow or stop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.bench.soak_client import Client, connecting, count_to
from pipeline.bench.soak_engine import HEAVY, word
from pipeline.bench.soak_findings import Finding, ordered
from pipeline.bench.soak_server import Server, fetch, scripted, serving, set_step

MAX_MIB = 300
_SAMPLE_S = 0.25
_SLOW_S = 1.0
"""What a slow reader takes for each event."""
_STILL_S = 1.0
"""An engine that has given nothing for so long is held back."""
Kind = Literal["quick", "slow", "stopped"]
"""Slow ones, and those that stop after an event, do so until all quick ones have ended."""


@dataclass(frozen=True)
class Streams:
    """How many there are, and of what length."""

    num_streams: int = 1000
    num_words: int = 120
    step_s: float = 0.25
    """Of the engine, from one word to the next."""
    num_stopped: int = 5
    """Readers that stop of streams too long for any buffer."""
    num_heavy_words: int = 6000

    def kind(self, number: int) -> Kind:
        """Of twenty, one is slow and one stops."""
        kinds: dict[int, Kind] = {0: "slow", 1: "stopped"}
        return kinds.get(number % 20, "quick")


@dataclass
class _Crowd:
    """How far all of them are."""

    num_quick: int
    num_open: int = 0
    most_open: int = 0
    num_whole: int = 0
    faults: list[str] = field(default_factory=list)
    num_held: int = 0
    """How many were open when the quick ones were over."""
    are_quick_over: asyncio.Event = field(default_factory=asyncio.Event)

    def end_quick(self) -> None:
        self.num_quick -= 1
        if not self.num_quick:
            self.num_held = self.num_open
            self.are_quick_over.set()


@dataclass
class Reading:
    """What a stream has told, word by word."""

    number: int
    num_words: int
    place: int = 0
    rest: str = ""
    usage: Any = None

    def take(self, chunk: Any) -> None:
        """Move on for each word that is the right one."""
        self.usage = chunk.get("usage", self.usage)
        for choice in chunk["choices"]:
            self.rest += choice["delta"].get("content") or ""
        while self.rest.startswith(expected := word(self.number, self.place)):
            self.rest = self.rest.removeprefix(expected)
            self.place += 1

    @property
    def fault(self) -> str | None:
        """None for all words in their order, and a usage that has counted them."""
        counted = self.usage and self.usage["completion_tokens"]
        if (self.place, self.rest, counted) == (self.num_words, "", self.num_words):
            return None
        return f"stream {self.number} had {self.place} words, then {self.rest[:40]!r}"


async def soak_streams(base: Path, streams: Streams, folder: Path) -> list[Finding]:
    """No event lost or out of order, memory within bounds, nobody held up by who does not read."""
    async with scripted() as engine:
        model = {"slug": "soak/counting", "urls": [engine], "tokenizer": str(base)}
        async with serving([model], folder) as server, connecting() as session:
            client = Client(session, server.url, str(server.first_key))
            await set_step(engine, streams.step_s)
            found = await _look(server, client, engine, streams)
            return found + await _stop(client, engine, streams)


async def _look(server: Server, client: Client, engine: str, streams: Streams) -> list[Finding]:
    kinds = [streams.kind(number) for number in range(streams.num_streams)]
    crowd, before_mib, peaks = _Crowd(kinds.count("quick")), server.resident_mib, [0.0]
    clock = asyncio.get_running_loop().time
    begun_s = clock()
    async with watching(server, peaks), asyncio.TaskGroup() as reading:
        for number, kind in enumerate(kinds):
            reading.create_task(_read(client, Reading(number, streams.num_words), kind, crowd))
        await crowd.are_quick_over.wait()
        quick_s = clock() - begun_s
        await set_step(engine, 0.0)
    least_s = streams.num_words * streams.step_s
    return [
        Finding(
            f"{len(kinds)} streams are open at once",
            f"{crowd.most_open}",
            crowd.most_open == len(kinds),
        ),
        ordered("no event lost or out of order", crowd.faults, f"{crowd.num_whole} whole streams"),
        Finding(
            "readers that are slow or have stopped hold nobody up",
            f"with {crowd.num_held} of those open the rest ended after {quick_s:.0f} s, of which "
            f"the engine took {least_s:.0f}",
            crowd.num_held == len(kinds) - kinds.count("quick"),
        ),
        Finding(
            f"the server takes at most {MAX_MIB} MiB",
            f"{peaks[0]:.0f} MiB, {before_mib:.0f} before",
            peaks[0] <= MAX_MIB,
        ),
    ]


async def _stop(client: Client, engine: str, streams: Streams) -> list[Finding]:
    """Readers that stop, of an engine that is as fast as it may be."""
    crowd, given, before = _Crowd(1), 0, -1
    async with asyncio.TaskGroup() as reading:
        for number in range(HEAVY, HEAVY + streams.num_stopped):
            stopped = Reading(number, streams.num_heavy_words)
            reading.create_task(_read(client, stopped, "stopped", crowd))
        while not given or given != before:
            await asyncio.sleep(_STILL_S)
            given, before = await _count_given(engine), given
        crowd.end_quick()
    most = streams.num_stopped * streams.num_heavy_words
    seen = f"the engine was held back after {given} of {most} words of 2 KB"
    return [
        Finding("what waits for a reader that has stopped is bounded", seen, given < most),
        ordered("it loses nothing when it reads on", crowd.faults),
    ]


async def _count_given(engine: str) -> int:
    """Of long words, by the engine."""
    given = await fetch(engine, "/given")
    return sum(num_words for number, num_words in given.items() if int(number) >= HEAVY)


async def _read(client: Client, reading: Reading, kind: Kind, crowd: _Crowd) -> None:
    try:
        await _read_chunks(client, reading, kind, crowd)
        if fault := reading.fault:
            crowd.faults.append(fault)
        else:
            crowd.num_whole += 1
    except Exception as error:  # noqa: BLE001 - whatever it is, this stream was not whole
        crowd.faults.append(f"stream {reading.number} broke off: {error!r}")
    finally:
        if kind == "quick":
            crowd.end_quick()


async def _read_chunks(client: Client, reading: Reading, kind: Kind, crowd: _Crowd) -> None:
    is_open = False
    async with aclosing(client.chunks(count_to(reading.num_words, reading.number))) as chunks:
        async for chunk in chunks:
            reading.take(chunk)
            if reading.place and not is_open:
                is_open = True
                crowd.num_open += 1
                crowd.most_open = max(crowd.most_open, crowd.num_open)
            if reading.place and kind == "stopped":
                await crowd.are_quick_over.wait()
            elif kind == "slow" and not crowd.are_quick_over.is_set():
                await asyncio.sleep(_SLOW_S)
    crowd.num_open -= is_open


@asynccontextmanager
async def watching(server: Server, peaks: list[float]) -> AsyncIterator[None]:
    """Keep the most memory that it has taken meanwhile."""

    async def watch() -> None:
        while True:
            peaks[0] = max(peaks[0], server.resident_mib)
            await asyncio.sleep(_SAMPLE_S)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
