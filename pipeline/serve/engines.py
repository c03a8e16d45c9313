"""The engine of a server: started over files and watched, or several at URLs as one."""

import asyncio
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
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
from pipeline.run import Run
from pipeline.serve.artefact import Load

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


async def start_engine(
    kind: Kind, load: Load, room: Room, chat: asyncio.Future[Chat], run: Run | None
) -> Supervisor:
    """llama.cpp or vLLM over files, warmed and watched, with its logs in the run's folder."""

    async def start(log: Path) -> OwnEngine:
        weights, adapters, context_tokens = load.weights, load.adapters, room.context_tokens
        if kind == "vllm":
            return await Vllm.start(
                weights,
                slots=room.slots or VLLM_SLOTS,
                context_tokens=context_tokens,
                log=log,
                adapters=adapters,
            )
        return await LlamaCpp.start(
            weights,
            slots=room.slots or LLAMACPP_SLOTS,
            context_tokens=context_tokens or LLAMACPP_CONTEXT_TOKENS,
            log=log,
            adapters=adapters,
        )

    async def warm_up(engine: Engine) -> None:
        await warm(engine, _hello(await chat), list(load.adapters))

    logs = Logs(kind, run.folder / "logs" if run else None)
    return await Supervisor.start(f"{_NAMES[kind]} with {load.weights}", start, warm_up, logs)


async def join_engines(urls: Sequence[str], chat: asyncio.Future[Chat]) -> Pool:
    """Engines that somebody else runs, with the API key that the environment holds."""
    key = os.environ.get(KEY_VARIABLE, "")
    pool = await Pool.at(urls, functools.partial(connect, api_key=key))
    try:
        await warm(pool, _hello(await chat))
    except BaseException:
        await pool.close()
        raise
    return pool


def _hello(chat: Chat) -> list[int]:
    return chat.prompt_ids([{"role": "user", "content": "Hello"}], None, "direct")
