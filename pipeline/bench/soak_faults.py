"""A server over llama.cpp that is harmed at random, stopped and killed; do its books balance?"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from pipeline.bench.soak_ask import PHASES, RANDOM, THINKING, Told, ask_on
from pipeline.bench.soak_books import PRICE, balance, check_sums
from pipeline.bench.soak_client import Client, connecting
from pipeline.bench.soak_ends import Ending, check_cancelled, refuses_locked_books
from pipeline.bench.soak_findings import Finding, ordered
from pipeline.bench.soak_harm import JUMPS_S, Clock, Harms
from pipeline.bench.soak_server import Server, scripted, serving, set_step
from pipeline.chat import CALL, END_THINK, Chat

_STEP_S = 0.01
"""Of the scripted engine, from one token to the next."""
_REPLIES_EACH = 3
"""After each jump of the clock."""
_CALM_S = 60
"""After the last harm all must be well again within it."""


@dataclass(frozen=True)
class Faults:
    """How long a server is harmed, and the number that says by what and when."""

    seed: int
    seconds: float = 90.0
    num_clients: int = 8
    num_streams: int = 20
    """Under way when the server is stopped, and when it is killed."""


async def soak_faults(base: Path, faults: Faults, folder: Path) -> list[Finding]:
    """One server after another, over the same books."""
    chat, clock, told = Chat(base), Clock(folder / "clock"), Told()
    tags = [str(chat.token_id(tag)) for tag in (END_THINK, CALL)]
    end_ids = (chat.end_of_turn_id, chat.token_id("<|endoftext|>"))
    found: list[Finding] = []
    async with connecting() as session, scripted("gateway_engine", *tags) as thinking:
        await set_step(thinking, _STEP_S)
        models = _models(base, thinking, faults)
        async with serving(models, folder) as server:
            client = Client(session, server.url, str(server.first_key))
            found += await _harm(server, client, faults, told, folder)
            found += await Ending(server, client, told, end_ids).stop(faults.num_streams)
        # Without llama.cpp, which looks at its clock so often that libfaketime makes it ten times
        # as slow.
        async with serving(models[1:], folder, clock.environment) as server:
            found.append(await _jump(replace(client, url=server.url), clock, told))
        async with serving(models, folder) as server:
            client = replace(client, url=server.url)
            found.append(await check_sums(client, folder))
            streams, killed = await Ending(server, client, told, end_ids).kill(faults.num_streams)
            found += killed
        async with serving(models, folder) as server:
            client = replace(client, url=server.url)
            found += [check_cancelled(folder, streams), *balance(folder, told)]
            found.append(await check_sums(client, folder))
            found += await Ending(server, client, told, end_ids).stop(0)
        found.append(await refuses_locked_books(models, folder))
    law = "failures are 502, 503 or 504 with their cause"
    return [*found, ordered(law, told.wrong, _counted(told.refusals))]


def _models(base: Path, thinking: str, faults: Faults) -> Sequence[Mapping[str, Any]]:
    """A random one does not think, so there is one that was told to."""
    room = {"slots": faults.num_streams, "context": 4096}
    return [
        {"slug": RANDOM, "checkpoint": str(base), "engine": "llamacpp", "price": PRICE, **room},
        {"slug": THINKING, "urls": [thinking], "tokenizer": str(base), "price": PRICE},
    ]


async def _harm(
    server: Server, client: Client, faults: Faults, told: Told, folder: Path
) -> list[Finding]:
    may_go_on = asyncio.Event()
    may_go_on.set()
    harms = Harms(server, folder, random.Random(faults.seed))
    async with asyncio.TaskGroup() as asking:
        for number in range(faults.num_clients):
            dice = random.Random(f"{faults.seed} {number}")
            asking.create_task(ask_on(client, dice, told, may_go_on))
        done = await harms.do(faults.seconds)
        is_calm = await _becomes_calm(client)
        may_go_on.clear()
    hung_up = ", ".join(f"{phase} {told.hang_ups[phase]}" for phase in PHASES)
    return [
        Finding(
            f"harmed at random for {faults.seconds:.0f} s, seed {faults.seed}",
            _counted(done),
            len(done) == len(harms.kinds),
        ),
        Finding("clients hang up in every phase", hung_up, len(told.hang_ups) == len(PHASES)),
        Finding("afterwards it is ready again", f"within {_CALM_S} s: {is_calm}", is_calm),
    ]


async def _jump(client: Client, clock: Clock, told: Told) -> Finding:
    """The server's clock moves, and it answers before and after."""
    law = "a clock that jumps past midnight and back changes no reply"
    if clock.library is None:
        return Finding(law, "not tried: libfaketime is missing")
    seen_s: list[int] = []
    body = {"model": THINKING, "messages": [{"role": "user", "content": "Go on."}]}
    for seconds in JUMPS_S:
        clock.jump(seconds)
        for _ in range(_REPLIES_EACH):
            reply = await client.whole({**body, "max_tokens": 50})
            told.note(reply)
            seen_s.append(reply["created"])
    span_s = max(seen_s) - min(seen_s)
    wanted_s = max(JUMPS_S) - min(JUMPS_S)
    return Finding(law, f"{len(seen_s)} replies over {span_s} s", abs(span_s - wanted_s) < _CALM_S)


async def _becomes_calm(client: Client) -> bool:
    """Whether the engine answers soon, and not too many rows wait for the books."""
    url = client.url.removesuffix("/api/v1") + "/ready"
    with suppress(TimeoutError):
        async with asyncio.timeout(_CALM_S):
            while True:
                with suppress(aiohttp.ClientError):
                    async with client.session.get(url) as response:
                        if response.status == 200:
                            return True
                await asyncio.sleep(0.2)
    return False


def _counted(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{what}: {num}" for what, num in sorted(counts.items()))
