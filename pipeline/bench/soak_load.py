"""Long use and too much use over a scripted engine: what leaks, and who is turned away."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.bench.soak_client import Client, Refused, connecting, count_to
from pipeline.bench.soak_findings import Finding, ordered, percentiles_ms
from pipeline.bench.soak_server import scripted, serving, set_step

MAX_DRIFT = 0.05
OVERLOAD = 20
"""So many times as many requests as may wait."""


@dataclass(frozen=True)
class Turns:
    """Requests one after another."""

    num_requests: int = 10_000
    num_before: int = 2000
    """After these the memory is what it should stay."""
    num_words: int = 8


@dataclass(frozen=True)
class Overload:
    """An engine of some slots, and how long it is asked for more."""

    slots: int = 8
    queue: int = 24
    num_words: int = 20
    step_s: float = 0.05
    seconds: float = 12.0
    """Of each of the two loads."""


@dataclass
class _Load:
    """What clients that ask again and again have met."""

    until_s: float
    num_accepted: int = 0
    num_refused: int = 0
    first_s: list[float] = field(default_factory=list)
    """From each accepted request to its first word."""
    faults: list[str] = field(default_factory=list)


async def soak_memory(base: Path, turns: Turns, folder: Path) -> list[Finding]:
    """What the server takes after many requests over what it took after some."""
    async with scripted() as engine:
        model = {"slug": "soak/counting", "urls": [engine], "tokenizer": str(base)}
        async with serving([model], folder) as server, connecting(reuses=True) as session:
            client = Client(session, server.url, str(server.first_key))
            await _ask_on(client, turns.num_before, turns.num_words)
            before = server.resident_mib
            await _ask_on(client, turns.num_requests - turns.num_before, turns.num_words)
            after = server.resident_mib
    seen = f"{before:.1f} MiB after {turns.num_before}, {after:.1f} MiB at the end"
    law = f"{turns.num_requests} requests in turn: memory drifts by less than {MAX_DRIFT:.0%}"
    return [Finding(law, f"{seen} ({after / before - 1:+.1%})", after < (1 + MAX_DRIFT) * before)]


async def _ask_on(client: Client, num_requests: int, num_words: int) -> None:
    for number in range(num_requests):
        if number % 2:
            await client.whole(count_to(num_words, number))
        else:
            async with aclosing(client.chunks(count_to(num_words, number))) as chunks:
                async for _ in chunks:
                    pass


async def soak_overload(base: Path, overload: Overload, folder: Path) -> list[Finding]:
    """As many clients as the engine has room for, then with many times its queue besides."""
    room = overload.slots + overload.queue
    async with scripted() as engine:
        model = {
            "slug": "soak/counting",
            "urls": [engine],
            "tokenizer": str(base),
            "slots": overload.slots,
            "queue": overload.queue,
        }
        async with serving([model], folder) as server, connecting(reuses=True) as session:
            client = Client(session, server.url, str(server.first_key))
            await set_step(engine, overload.step_s)
            alone = await _load(client, room, overload)
            crowded = await _load(client, room + OVERLOAD * overload.queue, overload)
    seen = f"{crowded.num_accepted} served, {crowded.num_refused} told to come back"
    alone_ms, crowded_ms = percentiles_ms(alone.first_s), percentiles_ms(crowded.first_s)
    idle = [] if crowded.num_refused and crowded.num_accepted >= room else ["no overload"]
    law = f"{OVERLOAD} times as many as may wait: the rest gets 429 and nothing else"
    return [
        ordered("as many as there is room for are served", alone.faults, f"{alone.num_accepted}"),
        ordered(law, crowded.faults + idle, seen),
        Finding(
            "(no law) their first word without the rest, and with it", f"{alone_ms}; {crowded_ms}"
        ),
    ]


async def _load(client: Client, num_clients: int, overload: Overload) -> _Load:
    load = _Load(time.monotonic() + overload.seconds)
    async with asyncio.TaskGroup() as asking:
        for number in range(num_clients):
            late_s = number / num_clients  # they are not one another's echo
            asking.create_task(_ask_again(client, late_s, overload.num_words, load))
    return load


async def _ask_again(client: Client, late_s: float, num_words: int, load: _Load) -> None:
    """One after another; who is turned away does what it was told, and waits."""
    await asyncio.sleep(late_s)
    while time.monotonic() < load.until_s:
        try:
            await _ask(client, num_words, load)
        except Refused as refused:
            if refused.status != 429 or not refused.retry_after:
                load.faults.append(str(refused))
                return
            load.num_refused += 1
            await asyncio.sleep(int(refused.retry_after) + late_s)


async def _ask(client: Client, num_words: int, load: _Load) -> None:
    begun_s, first_s, usage = time.monotonic(), None, None
    async with aclosing(client.chunks(count_to(num_words))) as chunks:
        async for chunk in chunks:
            if first_s is None:
                first_s = time.monotonic() - begun_s
            usage = chunk.get("usage", usage)
            if "error" in chunk:
                load.faults.append(str(chunk["error"]))
    if first_s is None or usage is None or usage["completion_tokens"] != num_words:
        load.faults.append(f"a reply of {num_words} words has the usage {usage}")
        return
    load.num_accepted += 1
    load.first_s.append(first_s)
