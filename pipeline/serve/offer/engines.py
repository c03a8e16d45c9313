"""The engine of a model: started over files and watched, or several at URLs as one."""

import asyncio
import functools
import hashlib
import os
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.chat import Chat
from pipeline.engine.choose import KEY_VARIABLE, Kind, connect
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.logs import Logs
from pipeline.engine.pool import Pool
from pipeline.engine.protocol import Engine
from pipeline.engine.supervisor import OwnEngine, Supervisor
from pipeline.engine.vllm import Vllm
from pipeline.engine.warm import warm
from pipeline.serve.offer.artefact import Load

LLAMACPP_SLOTS = 4
LLAMACPP_CONTEXT_TOKENS = 8192
VLLM_SLOTS = 256
_NAMES: dict[Kind, str] = {"llamacpp": "llama.cpp", "vllm": "vLLM"}


@dataclass(frozen=True)
class Room:
    """How much an engine of ours does at once; None is what suits the engine.

    llama.cpp sets memory aside for every slot, and vLLM only for what is used.
    """

    slots: int | None = None
    """Replies made at once; further requests wait for one of them."""
    context_tokens: int | None = None
    """Of each, prompt and completion together; at most the model's own."""
    gpu_memory: float | None = None
    """The share of it that vLLM takes."""


@dataclass(frozen=True)
class EngineSetup:
    """What an engine is started with."""

    kind: Kind
    room: Room
    urls: tuple[str, ...] = ()
    load: Load | None = None
    """None if it is elsewhere."""
    logs: Path | None = None
    """Where what it says is kept, if not among the temporary files."""
    state: Hashable = field(default=None, repr=False)
    """Of the files: another one if any of them has been written since."""

    @property
    def key(self) -> Hashable:
        """Setups of one key are one engine."""
        return self.kind, self.room, self.urls, self.state

    @property
    def slots(self) -> int | None:
        """Replies made at once; None is not known."""
        own = {"vllm": VLLM_SLOTS, "llamacpp": LLAMACPP_SLOTS}
        return self.room.slots or own.get(self.kind)


async def start_engine(
    setup: EngineSetup, chat: asyncio.Future[Chat], links: Path | None = None
) -> Engine:
    """What is set up, warmed.

    In the folder `links` other processes find it for `join_engine`, also once it has been started
    again.
    """
    if setup.load is None:
        return await _reach(setup.urls, chat)
    return await _start(setup, setup.load, chat, links)


async def join_engine(
    setup: EngineSetup, chat: asyncio.Future[Chat], links: Path, part: int, num_parts: int
) -> Engine:
    """The same where another process has started it, as one of several."""
    load = setup.load
    if load is None:
        return await _reach(setup.urls, chat, part, num_parts)

    async def join(link: str) -> Engine:
        if setup.kind == "vllm":
            return await Vllm.join(Path(link), load.weights, load.adapters)
        return await LlamaCpp.join(Path(link), load.adapters, part, num_parts)

    return await Pool.at([str(_link(links, setup))], join)


def _link(links: Path, setup: EngineSetup) -> Path:
    return links / f"{hashlib.sha256(repr(setup.key).encode()).hexdigest()[:8]}.sock"


async def _start(
    setup: EngineSetup, load: Load, chat: asyncio.Future[Chat], links: Path | None
) -> Supervisor:
    """llama.cpp or vLLM over files, watched."""

    async def start(log: Path) -> OwnEngine:
        engine = await start_kind(log)
        if links:
            link = _link(links, setup)
            link.unlink(missing_ok=True)
            link.symlink_to(engine.socket)
        return engine

    async def start_kind(log: Path) -> OwnEngine:
        room, slots = setup.room, setup.slots
        assert slots is not None
        if setup.kind == "vllm":
            share = room.gpu_memory
            return await Vllm.start(
                load.weights,
                slots=slots,
                context_tokens=room.context_tokens,
                log=log,
                adapters=load.adapters,
                options=("--gpu-memory-utilization", str(share)) if share else (),
            )
        return await LlamaCpp.start(
            load.weights,
            slots=slots,
            context_tokens=room.context_tokens or LLAMACPP_CONTEXT_TOKENS,
            log=log,
            adapters=load.adapters,
        )

    async def warm_up(engine: Engine) -> None:
        await warm(engine, _hello(await chat), list(load.adapters))

    logs = Logs(setup.kind, setup.logs)
    return await Supervisor.start(f"{_NAMES[setup.kind]} with {load.weights}", start, warm_up, logs)


async def _reach(
    urls: tuple[str, ...], chat: asyncio.Future[Chat], part: int = 0, num_parts: int = 1
) -> Pool:
    """Engines that somebody else runs, with the API key that the environment holds."""
    key = os.environ.get(KEY_VARIABLE, "")
    pool = await Pool.at(
        urls, functools.partial(connect, api_key=key, part=part, num_parts=num_parts)
    )
    try:
        await warm(pool, _hello(await chat))
    except BaseException:
        await pool.close()
        raise
    return pool


def _hello(chat: Chat) -> list[int]:
    return chat.prompt_ids([{"role": "user", "content": "Hello"}], None, "direct")
