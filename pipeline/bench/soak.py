"""A server left running under every kind of trouble, and the laws that it has to keep."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import uvloop

from pipeline.bench.machine import describe_machine, find_versions, tell_conditions
from pipeline.bench.soak_faults import Faults, soak_faults
from pipeline.bench.soak_findings import Finding
from pipeline.bench.soak_load import Overload, Turns, soak_memory, soak_overload
from pipeline.bench.soak_streams import Streams, soak_streams
from pipeline.errors import PipelineError
from pipeline.run import write_json
from pipeline.serve.server import raise_open_files

log = logging.getLogger(__name__)

RESULT = "soak.json"
_PATIENCE_S = 200
"""For each of its parts."""
_TOTAL_S, _ENDS_S = 300, 60
"""All of it should take no longer; so much of that is for what comes after the faults."""


class LawBroken(PipelineError):
    """A server has not kept what it promises."""

    exit_code = 1


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    faults: Faults
    streams: Streams = field(default_factory=Streams)
    turns: Turns = field(default_factory=Turns)
    overload: Overload = field(default_factory=Overload)


@dataclass(frozen=True)
class Result:
    """What `pipeline bench soak` finds out."""

    conditions: str
    findings: list[Finding]

    def check(self) -> None:
        """LawBroken, with the names of all that were."""
        broken = [f"{found.law} ({found.seen})" for found in self.findings if not found.is_kept]
        if broken:
            raise LawBroken(f"{len(broken)} laws are broken: {'; '.join(broken)}")


def soak(base: Path, plan: Plan, folder: Path) -> Result:
    """Each part over a server of its own; writes soak.json."""
    begun_s = time.monotonic()
    raise_open_files()  # the clients' and the scripted engine's too
    parts: dict[str, Callable[[Path], Awaitable[list[Finding]]]] = {
        "turns": lambda part: soak_memory(base, plan.turns, part),
        "streams": lambda part: soak_streams(base, plan.streams, part),
        "overload": lambda part: soak_overload(base, plan.overload, part),
        "faults": lambda part: soak_faults(base, _shortened(plan.faults, begun_s), part),
    }
    findings: list[Finding] = []
    for name, soak_part in parts.items():
        (folder / name).mkdir()
        log.info("soak: %s", name)
        findings += uvloop.run(_bounded(name, soak_part(folder / name)))
    versions = find_versions(["aiohttp", "uvicorn", "uvloop", "sqlalchemy", "xllamacpp"])
    result = Result(tell_conditions(describe_machine(), versions), findings)
    write_json(folder / RESULT, asdict(result))
    return result


def table(result: Result) -> str:
    """As Markdown."""
    lines = ["| law | seen | kept |", "|---|---|---|"]
    lines += [f"| {f.law} | {f.seen} | {'yes' if f.is_kept else 'NO'} |" for f in result.findings]
    return "\n".join([*lines, "", result.conditions])


def _shortened(faults: Faults, begun_s: float) -> Faults:
    """For what is left of the time: a machine with other work to do takes longer for the rest."""
    left_s = _TOTAL_S - _ENDS_S - (time.monotonic() - begun_s)
    return replace(faults, seconds=max(0.0, min(faults.seconds, left_s)))


async def _bounded(name: str, part: Awaitable[list[Finding]]) -> list[Finding]:
    try:
        return await asyncio.wait_for(part, _PATIENCE_S)
    except TimeoutError:
        return [Finding(f"{name} come to an end", f"not within {_PATIENCE_S} s", False)]
