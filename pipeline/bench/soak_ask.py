"""Requests at random, some of whose clients hang up in the middle, and what they were told."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import aiohttp

from pipeline.bench.soak_client import Body, Client, Refused

Phase = Literal["headers", "reasoning", "answer", "usage"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In which a client may hang up: before the headers, and as soon as the others begin."""
RANDOM, THINKING = "soak/random", "soak/thinking"
"""The models that are asked: by llama.cpp, and by a script that thinks if it is to."""
WITH_CAUSE = (502, 503, 504)
_SHARE_OF_HANG_UPS = 0.5
_HEADERS_S = 0.03
"""Within such a time a client hangs up that waits for the headers."""


@dataclass
class Told:
    """By a server, to all who asked it."""

    usages: dict[str, Any] = field(default_factory=dict)
    """By the id of each reply that told its own."""
    hang_ups: Counter[Phase] = field(default_factory=Counter)
    refusals: Counter[int] = field(default_factory=Counter)
    """By status, in the stream or before it."""
    wrong: list[str] = field(default_factory=list)
    """What no fault excuses."""

    def note(self, part: Any) -> None:
        """A chunk of a reply, or one in one piece."""
        if usage := part.get("usage"):
            self.usages[part["id"]] = usage
        errors = [choice.get("error") for choice in part.get("choices", ())]
        for error in filter(None, [part.get("error"), *errors]):
            self.refuse(error["code"], error["message"])

    def refuse(self, status: int, message: str) -> None:
        """Only what is missing may be a reason."""
        self.refusals[status] += 1
        if status not in WITH_CAUSE or not message:
            self.wrong.append(f"{status} {message!r}")


async def ask_on(client: Client, dice: random.Random, told: Told, may_go_on: asyncio.Event) -> None:
    """One request after another, until it may not."""
    while may_go_on.is_set():
        try:
            await _ask(client, dice, told)
        except Refused as refused:
            told.refuse(refused.status, refused.message)
            await asyncio.sleep(0.1)
        except Exception as error:  # noqa: BLE001 - whatever it is, it was no answer
            told.wrong.append(repr(error))


async def follow(client: Client, body: Body, told: Told, see: Callable[[Any], None]) -> None:
    """A stream as long as its server lives."""
    try:
        async with aclosing(client.chunks(body)) as chunks:
            async for chunk in chunks:
                see(chunk)
                told.note(chunk)
    except Refused as refused:
        told.refuse(refused.status, refused.message)
    except aiohttp.ClientError:
        pass  # it lives no longer


async def _ask(client: Client, dice: random.Random, told: Told) -> None:
    rarest = min(PHASES, key=lambda phase: (told.hang_ups[phase], dice.random()))
    phase = rarest if dice.random() < _SHARE_OF_HANG_UPS else None
    body = _body(dice, phase)
    if phase is None and dice.random() < 0.5:
        told.note(await client.whole(body))
    elif phase == "headers":
        try:
            async with asyncio.timeout(dice.random() * _HEADERS_S):
                await _read(client, body, told, None)
        except TimeoutError:
            told.hang_ups[phase] += 1
    else:
        await _read(client, body, told, phase)


async def _read(client: Client, body: Body, told: Told, until: Phase | None) -> None:
    async with aclosing(client.chunks(body)) as chunks:
        async for chunk in chunks:
            told.note(chunk)
            if until and until in _phases(chunk):
                told.hang_ups[until] += 1
                return


def _phases(chunk: Any) -> set[Phase]:
    deltas = [choice["delta"] for choice in chunk["choices"]]
    begun: dict[Phase, bool] = {
        "reasoning": any(delta.get("reasoning") for delta in deltas),
        "answer": any(delta.get("content") for delta in deltas),
        "usage": "usage" in chunk,
    }
    return {phase for phase, has_begun in begun.items() if has_begun}


def _body(dice: random.Random, until: Phase | None) -> Body:
    """A question that nobody has asked before, to be thought about or not."""
    thinking = {"max_tokens": dice.randint(8, 48)}
    body = {
        "model": dice.choice([RANDOM, THINKING]),
        "messages": [{"role": "user", "content": f"What is {dice.random()}?"}],
        "reasoning": dice.choice([thinking, {"enabled": False}]),
        "max_tokens": dice.randint(50, 120),
        "seed": dice.getrandbits(31),
    }
    return body | ({"model": THINKING, "reasoning": thinking} if until == "reasoning" else {})
