"""What our server costs beside the engine alone, a bare forwarder and LiteLLM's proxy."""

import asyncio
import logging
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import uvloop

from pipeline.bench.conversations import make_conversations
from pipeline.bench.gateway_load import ask_at_once, rate
from pipeline.bench.gateway_ways import Way, Ways, start_all
from pipeline.bench.machine import describe_machine, find_versions, tell_conditions
from pipeline.run import write_json

log = logging.getLogger(__name__)

RESULT = "bench-gateway.json"
_PROMPT_CHARACTERS = 2048
_STEP_S = 0.02
_START_TOKENS = 52  # of several, so that all are still streaming when the last one begins
_FLOW_STREAMS, _FLOW_TOKENS = 64, 256
_ALONE, _ALONE_TOKENS = 50, 2
"""Single streams follow one another: pauses would measure how a processor wakes up."""
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string"}},
            "required": ["word"],
        },
    },
}
_PLAIN = {"max_tokens": _FLOW_TOKENS, "reasoning": {"enabled": False}}
# A thought that uses up its budget, an answer, and a call.
_PHASES = {"max_tokens": 3 * _FLOW_TOKENS, "reasoning": {"max_tokens": 128}, "tools": [_TOOL]}


@dataclass(frozen=True)
class Starts:
    """Time to the first event, of streams that begin at the same moment: medians of rounds."""

    way: str
    streams: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Flow:
    """Events a second of many streams whose engine waits for nothing: medians of rounds."""

    way: str
    reply: str
    """plain, or phases: a thought with a budget, an answer, a call."""
    per_s: float
    """As the client counts them, with its process on a core of its own."""
    per_cpu_s: float
    """By the time that its process was on that core, whoever else wanted it."""


@dataclass(frozen=True)
class Result:
    """What `pipeline bench gateway` measures."""

    conditions: str
    left_out: str
    """A sentence about what could not be measured, or nothing."""
    starts: list[Starts]
    flows: list[Flow]


def bench_gateway(
    base: Path, litellm: Path, streams: Sequence[int], rounds: int, folder: Path
) -> Result:
    """All ways to one scripted engine take turns; writes bench-gateway.json.

    `litellm` is the program, which is left out if it is not there.
    """
    with ExitStack() as stack:
        ways = start_all(base, litellm, folder, stack)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            starts, flows = runner.run(_measure(ways, streams, rounds))
    versions = find_versions(["aiohttp", "orjson", "uvicorn", "uvloop"]) | ways.versions
    conditions = tell_conditions(describe_machine(), versions)
    result = Result(conditions, ways.left_out, starts, flows)
    write_json(folder / RESULT, asdict(result))
    return result


def table(result: Result) -> str:
    """As Markdown."""
    lines = ["| to the first event | streams | p50, ms | p99, ms |", "|---|---|---|---|"]
    lines += [f"| {s.way} | {s.streams} | {s.p50_ms:.1f} | {s.p99_ms:.1f} |" for s in result.starts]
    lines += ["", "| events a second | reply | wall | of its CPU |", "|---|---|---|---|"]
    lines += [
        f"| {flow.way} | {flow.reply} | {flow.per_s:.0f} | {flow.per_cpu_s:.0f} |"
        for flow in result.flows
    ]
    lines += ["", *_ratios(result.starts), *filter(None, [result.left_out]), result.conditions]
    return "\n".join(lines)


def _ratios(starts: Sequence[Starts]) -> list[str]:
    """Ours beside the others."""
    seen = {(start.way, start.streams): start for start in starts}
    lines = []
    for (way, streams), ours in seen.items():
        if way != "ours":
            continue
        added = ours.p50_ms - seen["engine", streams].p50_ms
        forwarder = seen["forwarder", streams]
        lines.append(
            f"{streams} streams: {added:.1f} ms more than the engine alone (p50); "
            f"{ours.p50_ms / forwarder.p50_ms:.2f} of the forwarder's p50, "
            f"{ours.p99_ms / forwarder.p99_ms:.2f} of its p99."
        )
    return lines


async def _measure(
    ways: Ways, streams: Sequence[int], rounds: int
) -> tuple[list[Starts], list[Flow]]:
    numbers = count()
    starts = [start for num in streams for start in await _starts(ways, num, rounds, numbers)]
    await ways.set_step(0.0)
    with ways.apart():
        flows = await _flows(ways, rounds)
    return starts, flows


async def _starts(ways: Ways, streams: int, rounds: int, numbers: "count[int]") -> list[Starts]:
    await ways.set_step(0.0 if streams == 1 else _STEP_S)
    seen: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways.over_http}
    for turn in range(rounds + 1):
        for way in ways.over_http:
            times: list[float] = []
            for _ in range(_ALONE if streams == 1 else 1):
                num_tokens = _ALONE_TOKENS if streams == 1 else _START_TOKENS
                bodies = [_start_body(way, next(numbers), num_tokens) for _ in range(streams)]
                times += [told.first_s for told in await ask_at_once(way.target, bodies)]
            if turn:  # the first one warms
                seen[way.name].append(_percentiles(times))
    found = [
        Starts(
            name, streams, *(1000 * statistics.median(column) for column in zip(*rows, strict=True))
        )
        for name, rows in seen.items()
    ]
    for start in found:
        log.info("%s, %d streams: p50 %.1f ms", start.way, streams, start.p50_ms)
    return found


def _percentiles(times: Sequence[float]) -> tuple[float, float]:
    times = sorted(times)
    return times[len(times) // 2], times[int(0.99 * len(times))]


async def _flows(ways: Ways, rounds: int) -> list[Flow]:
    wanted = [(way, "plain", _flow_body(way, _PLAIN)) for way in [*ways.over_http, ways.inside]]
    wanted += [(way, "phases", _flow_body(way, _PHASES)) for way in [ways.ours, ways.inside]]
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for turn in range(rounds + 1):
        for way, reply, body in wanted:
            begun_s = way.cpu_s()
            per_s, num_events = await rate(way.target, body, _FLOW_STREAMS)
            if turn:
                per_cpu_s = num_events / (way.cpu_s() - begun_s)
                seen.setdefault((way.name, reply), []).append((per_s, per_cpu_s))
                log.info("%s, %s: %.0f events/s", way.name, reply, per_s)
    return [
        Flow(*key, *(statistics.median(column) for column in zip(*rows, strict=True)))
        for key, rows in seen.items()
    ]


def _start_body(way: Way, number: int, num_tokens: int) -> Mapping[str, Any]:
    """No two prompts have a common beginning, so that no cache helps anybody."""
    message = {"role": "user", "content": _text(number)}
    return way.body([message], {**_PLAIN, "max_tokens": num_tokens})


def _flow_body(way: Way, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return way.body([{"role": "user", "content": "Say many words."}], fields)


def _text(number: int) -> str:
    words = f"{number}."
    for conversation in make_conversations(20 * number, 20):
        words += "".join(f" {message['content']}" for message in conversation["messages"])
        if len(words) > _PROMPT_CHARACTERS:
            break
    return words[:_PROMPT_CHARACTERS]
