"""Tokens a second through our server beside the engine alone, and what a second phase costs."""

import asyncio
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp

from pipeline.bench.machine import describe_machine, find_versions, tell_conditions
from pipeline.chat import EARLY_STOP, Chat
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.protocol import Sampling
from pipeline.engine.vllm import Vllm
from pipeline.errors import PipelineError
from pipeline.run import write_json
from pipeline.serve.offer.artefact import find_artefact, load

log = logging.getLogger(__name__)

RESULT = "bench-engine.json"
_ROUNDS = 3
_CONTEXT_TOKENS = 2048
_PHASE_PROMPT_WORDS, _PHASE_TOKENS = 600, 32
Kind = Literal["llamacpp", "vllm"]
OwnEngine = LlamaCpp | Vllm
Stream = Callable[[int], Awaitable[int]]
"""Runs the request of that number, gives how many tokens came."""


@dataclass(frozen=True)
class Rate:
    """One line of the table: medians of rounds that took turns."""

    streams: int
    alone: float
    """Tokens a second of the engine alone."""
    ours: float
    """The same through our server, in front of an engine of the same kind."""


@dataclass(frozen=True)
class SecondPhase:
    """A thought that was continued as an answer, against prompts nothing of which is cached."""

    prompt_tokens: int
    computed_tokens: int
    """Of the second prompt, how many were not cached."""
    seconds: float
    """To its first token."""
    fresh_seconds: float
    """To the first token of a new prompt of `computed_tokens`."""
    whole_seconds: float
    """To the first token of a new prompt of `prompt_tokens`."""


@dataclass(frozen=True)
class Result:
    """What `pipeline bench engine` measures."""

    conditions: str
    rates: list[Rate]
    second_phase: SecondPhase


def bench_engine(
    base: Path, kind: Kind, streams: Sequence[int], num_tokens: int, folder: Path
) -> Result:
    """Both engines run over the same files at once, and take turns; writes bench-engine.json."""
    return asyncio.run(_bench(base, kind, streams, num_tokens, folder))


def table(result: Result) -> str:
    """As Markdown."""
    lines = [
        "| streams | engine alone, tok/s | through us | ratio |",
        "|---|---|---|---|",
        *(
            f"| {rate.streams} | {rate.alone:.0f} | {rate.ours:.0f} "
            f"| {rate.ours / rate.alone:.2f} |"
            for rate in result.rates
        ),
    ]
    phase = result.second_phase
    lines += [
        "",
        f"A second phase after {phase.prompt_tokens} tokens computes {phase.computed_tokens} of "
        f"them: {phase.seconds * 1000:.0f} ms to its first token; a new prompt of so many takes "
        f"{phase.fresh_seconds * 1000:.0f} ms, one of all {phase.whole_seconds * 1000:.0f} ms.",
        result.conditions,
    ]
    return "\n".join(lines)


async def _bench(
    base: Path, kind: Kind, streams: Sequence[int], num_tokens: int, folder: Path
) -> Result:
    artefact = find_artefact(base, "auto", kind)
    files, chat = load(artefact, {}, kind), Chat(artefact.folder)
    prompts = [[{"role": "user", "content": text}] for text in _questions(max(streams))]
    ids = [chat.prompt_ids(prompt, None, "direct") for prompt in prompts]
    # Nobody ends its turn, so that every stream has the same length.
    bias = {chat.end_of_turn_id: -100}
    slots = max(streams)
    async with _engine(kind, files.weights, slots, folder / "engine.log") as engine:
        sampling = Sampling(num_tokens, temperature=0.0, logit_bias=bias)
        phase = await _second_phase(engine, chat)
        with _server(base, kind, slots, folder) as (url, key):
            async with (
                _raw(engine, ids, sampling) as alone,
                _ours(url, key, prompts, num_tokens, bias) as ours,
            ):
                rates = [await _compare(number, alone, ours) for number in streams]
    versions = find_versions(["aiohttp", "uvicorn", "xllamacpp"])
    conditions = tell_conditions(describe_machine(), versions)
    result = Result(conditions, rates, phase)
    write_json(folder / RESULT, asdict(result))
    return result


def _questions(count: int) -> Iterator[str]:
    """No two with a common beginning, so that no cache of prompts helps either side."""
    for number in range(count):
        yield f"{number} bottles: tell a story of {number + 3} sentences about number {number}."


@asynccontextmanager
async def _engine(
    kind: Kind, weights: Path, slots: int, log_file: Path
) -> AsyncIterator[OwnEngine]:
    start = Vllm.start if kind == "vllm" else LlamaCpp.start
    engine: OwnEngine = await start(
        weights, slots=slots, context_tokens=_CONTEXT_TOKENS, log=log_file
    )
    async with engine:
        yield engine


@contextmanager
def _server(base: Path, kind: Kind, slots: int, folder: Path) -> Iterator[tuple[str, str]]:
    """A server as a user starts it: its URL, and its first key."""
    command = [sys.executable, "-m", "pipeline", "serve", str(base), "--engine", kind]
    command += ["--port", "0", "--slots", str(slots), "--context-tokens", str(_CONTEXT_TOKENS)]
    command += ["--books", str(folder / "books.sqlite")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            assert process.stdout is not None
            said: dict[str, str] = {}
            while "serving at" not in said:
                line = process.stdout.readline()
                if not line:
                    raise PipelineError(f"`{' '.join(command[1:])}` did not start")
                if found := re.match(r"(serving at|key) (\S+)", line):
                    said[found[1]] = found[2]
            yield said["serving at"], said["key"]
        finally:
            process.terminate()


async def _compare(number: int, alone: Stream, ours: Stream) -> Rate:
    rates: dict[Stream, list[float]] = {alone: [], ours: []}
    for turn in range(_ROUNDS + 1):
        for stream, measured in rates.items():
            seen = await _rate(stream, number)
            if turn:  # the first one warms
                measured.append(seen)
    rate = Rate(number, *(statistics.median(measured) for measured in rates.values()))
    log.info("%d streams: %.0f tok/s alone, %.0f through us", number, rate.alone, rate.ours)
    return rate


async def _rate(stream: Stream, number: int) -> float:
    begun_s = time.perf_counter()
    counts = await asyncio.gather(*(stream(index) for index in range(number)))
    return sum(counts) / (time.perf_counter() - begun_s)


@asynccontextmanager
async def _raw(
    engine: OwnEngine, ids: Sequence[list[int]], sampling: Sampling
) -> AsyncIterator[Stream]:
    """The engine's own route, and nothing of ours but the body we would send."""
    assert engine.connection.child is not None
    connector = aiohttp.UnixConnector(
        str(engine.connection.child.socket), limit=0, force_close=True
    )
    async with aiohttp.ClientSession(connector=connector) as session:

        async def stream(index: int) -> int:
            body = engine.body(ids[index], sampling)
            last = await _last_event(session, f"http://engine{engine.route}", {}, body)
            return int(last.get("tokens_predicted") or last["usage"]["completion_tokens"])

        yield stream


@asynccontextmanager
async def _ours(
    url: str, key: str, prompts: Sequence[Any], num_tokens: int, bias: dict[int, int]
) -> AsyncIterator[Stream]:
    fields = {
        "max_tokens": num_tokens,
        "temperature": 0,
        "top_p": 1,
        "top_k": 0,
        "reasoning": {"enabled": False},
        "logit_bias": {str(token): value for token, value in bias.items()},
        "stream": True,
    }
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def stream(index: int) -> int:
            body = {**fields, "messages": prompts[index]}
            last = await _last_event(session, f"{url}/chat/completions", headers, body)
            return int(last["usage"]["completion_tokens"])

        yield stream


async def _last_event(
    session: aiohttp.ClientSession, url: str, headers: dict[str, str], body: Any
) -> dict[str, Any]:
    """The last JSON of a stream, which has the counts."""
    last = b""
    async with session.post(url, json=body, headers=headers) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                last = line
    if not last:
        raise PipelineError(f"{url} gave no event")
    return dict(json.loads(last.removeprefix(b"data: ")))


async def _second_phase(engine: OwnEngine, chat: Chat) -> SecondPhase:
    """Medians of rounds, each over words of its own."""
    rounds = [await _measure_phase(engine, chat, number) for number in range(_ROUNDS)]
    middle = sorted(rounds, key=lambda phase: phase.seconds)[_ROUNDS // 2]
    log.info("a second phase: %.0f ms", middle.seconds * 1000)
    return middle


async def _measure_phase(engine: OwnEngine, chat: Chat, number: int) -> SecondPhase:
    text = " ".join(f"{number}{place}" for place in range(_PHASE_PROMPT_WORDS // 2))
    prompt = chat.prompt_ids([{"role": "user", "content": text}], None, "thinking")
    thought: list[int] = []
    sampling = Sampling(_PHASE_TOKENS, temperature=0.0, logit_bias={chat.end_of_turn_id: -100})
    async with aclosing(engine.generate(prompt, sampling)) as deltas:
        async for delta in deltas:
            thought += delta.ids
    second = prompt + thought + chat.reply_ids(EARLY_STOP)
    seconds, computed = await _first_token(engine, second)
    fresh = [token + 1 for token in second]
    return SecondPhase(
        prompt_tokens=len(second),
        computed_tokens=computed,
        seconds=seconds,
        fresh_seconds=(await _first_token(engine, fresh[-computed:]))[0],
        whole_seconds=(await _first_token(engine, fresh))[0],
    )


async def _first_token(engine: OwnEngine, prompt: Sequence[int]) -> tuple[float, int]:
    """Seconds to it, and how many tokens of the prompt were computed for it."""
    begun_s = time.perf_counter()
    async with aclosing(engine.generate(prompt, Sampling(2, temperature=0.0))) as deltas:
        async for delta in deltas:
            computed = delta.num_prompt_tokens - delta.num_cached_tokens
            return time.perf_counter() - begun_s, computed
    raise PipelineError("the engine said nothing")
