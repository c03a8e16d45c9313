"""How a server ends in the middle of streams, and what is in its books then."""

import asyncio
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from pipeline.bench.soak_ask import RANDOM, Told, follow
from pipeline.bench.soak_books import read_rows
from pipeline.bench.soak_client import Body, Client, Refused
from pipeline.bench.soak_findings import Finding, ordered
from pipeline.bench.soak_harm import orphans
from pipeline.bench.soak_server import GRACE_S, Server, books_of, log_of, starting

_LONG, _MIDDLE, _SHORT = 3900, 100, 40
"""Tokens: more than a grace period is long enough for, less than that, and soon over."""
_JOURNALLED_S = 2.0
"""So long before a kill tokens came that must be in the books; the journal is a second behind."""
_KILLED_S = 4.0
"""After which a server is killed."""
_GONE_S = 15
REFUSED = 2
"""The exit code of a command that the user must mend something for."""


@dataclass
class Stream:
    """One reply under way, as its client sees it."""

    id: str = ""
    came_s: list[float] = field(default_factory=list)
    """When each bit of it did."""
    is_whole: bool = False
    has_end: bool = False
    """Whether it is whole, or was told why not."""
    is_over: bool = False

    def end(self, _: object) -> None:
        """Nothing more comes."""
        self.is_over = True

    def see(self, chunk: Any) -> None:
        """The next chunk."""
        self.id = chunk["id"]
        self.is_whole |= "usage" in chunk and "error" not in chunk
        self.has_end |= "usage" in chunk or "error" in chunk
        if any(choice["delta"].get("content") for choice in chunk["choices"]):
            self.came_s.append(time.monotonic())


@dataclass(frozen=True)
class Ending:
    """Of a server in the middle of streams."""

    server: Server
    client: Client
    told: Told
    end_ids: Sequence[int]
    """Tokens that would end a reply; the model is kept from them."""

    async def stop(self, num_streams: int) -> list[Finding]:
        """SIGTERM: the streams end, then the server does, and all that it has started."""
        children, num_long = self.server.children(), num_streams // 2
        async with self._streaming([_LONG] * num_long + [_MIDDLE] * num_long) as streams:
            begun_s = time.monotonic()
            ending = asyncio.create_task(self.server.end(signal.SIGTERM))
            refusal = await self._ask_late() if streams else ""
            code = await ending
            took_s = time.monotonic() - begun_s
        cut = [f"{s.id or 'one'} ended without a word" for s in streams if not s.has_end]
        num_whole = sum(stream.is_whole for stream in streams)
        late = [] if refusal in ("", "503") else [f"a new request was told {refusal}"]
        when = f"SIGTERM in {num_streams} streams"
        return [
            Finding(
                f"{when}: exit code 0 after a grace period of {GRACE_S} s, if it takes that",
                f"exit code {code} after {took_s:.1f} s",
                code == 0,
            ),
            ordered(
                f"{when}: they end whole or with a cause, and new requests get 503",
                cut + late,
                f"{num_whole} whole, {len(streams) - num_whole} cut",
            ),
            await _nobody_is_left(when, children),
        ]

    async def kill(self, num_streams: int) -> tuple[Sequence[Stream], list[Finding]]:
        """SIGKILL, when one of the streams has ended."""
        children = self.server.children()
        async with self._streaming([_SHORT, *[_LONG] * (num_streams - 1)]) as streams:
            await asyncio.sleep(_KILLED_S)
            await self.server.end(signal.SIGKILL)
        return streams, [await _nobody_is_left(f"kill -9 in {num_streams} streams", children)]

    @asynccontextmanager
    async def _streaming(self, lengths: Sequence[int]) -> AsyncIterator[Sequence[Stream]]:
        """So many streams, each of which has begun; at the end all are over."""
        streams = [Stream() for _ in lengths]
        async with asyncio.TaskGroup() as reading:
            for stream, length in zip(streams, lengths, strict=True):
                following = follow(self.client, self._body(length), self.told, stream.see)
                reading.create_task(following).add_done_callback(stream.end)
            while not all(stream.came_s or stream.is_over for stream in streams):
                await asyncio.sleep(0.01)
            yield streams

    async def _ask_late(self) -> str:
        """What a server that is about to end says to a new request."""
        await asyncio.sleep(0.2)
        try:
            await self.client.whole(self._body(_SHORT))
        except Refused as refused:
            return f"{refused.status}" if refused.retry_after else f"{refused.status} alone"
        except aiohttp.ClientError:
            return ""  # it has ended already
        return "a reply"

    def _body(self, max_tokens: int) -> Body:
        return {
            "model": RANDOM,
            "messages": [{"role": "user", "content": "Go on."}],
            "reasoning": {"enabled": False},
            "max_tokens": max_tokens,
            "logit_bias": {str(end_id): -100 for end_id in self.end_ids},
        }


def check_cancelled(folder: Path, streams: Sequence[Stream]) -> Finding:
    """Whether what was under way is in the books as cancelled, as far as it was journalled."""
    rows, faults = read_rows(folder), []
    under_way = [stream for stream in streams if not stream.has_end]
    for stream in under_way:
        until_s = max(s.came_s[-1] for s in streams if s.came_s) - _JOURNALLED_S
        least = sum(came_s < until_s for came_s in stream.came_s)
        row = rows.get(stream.id)
        if row is None or not row["cancelled"] or row["completion_tokens"] < least:
            faults.append(f"{stream.id}, of which {least} tokens were seen in time, is {row}")
    law = "kill -9: what was under way is booked as cancelled, with what was journalled"
    seen = f"{len(under_way)} of {len(streams)} under way"
    return ordered(law, faults if under_way else ["no stream was under way"], seen)


async def refuses_locked_books(models: Sequence[Any], folder: Path) -> Finding:
    """A server does not start over books that it cannot write."""
    log = log_of(folder)
    before = len(log.read_bytes())
    with closing(sqlite3.connect(books_of(folder))) as books:
        books.execute("BEGIN EXCLUSIVE")
        async with starting(models, folder) as process:
            code = await asyncio.wait_for(process.wait(), 60)
    lines = log.read_bytes()[before:].decode(errors="replace").strip().splitlines()
    said = lines[-1] if lines else "nothing"
    is_kept = code == REFUSED and "cannot be written" in said
    return Finding("books that cannot be written are refused", f"exit code {code}", is_kept)


async def _nobody_is_left(when: str, children: Sequence[psutil.Process]) -> Finding:
    with suppress(TimeoutError):
        async with asyncio.timeout(_GONE_S):
            while orphans(children):
                await asyncio.sleep(0.1)
    return ordered(f"{when}: no process is left", orphans(children), f"{len(children)} engine")
