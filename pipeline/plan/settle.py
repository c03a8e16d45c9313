"""From auto to numbers, and what to change where nothing fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pipeline.plan.job import Job
from pipeline.plan.machine import gpu_machine
from pipeline.recipe import Gpu, Train

USEFUL_TOKENS = 4096
"""A GPU is busy with as many at once: to have them, checkpointing is worth its price."""
MOST_TOKENS = 16_384
"""More at once gain nothing: weights are read seldom enough."""
FILLED = 0.9
"""Of the memory, where the plan itself chooses: a prediction may be wrong by a tenth."""
LONGEST_SEARCH = 1 << 20
"""Tokens: no context is longer."""
CHECKPOINTING = ("none", "selective", "full")
"""From the most memory to the least."""
FREE: dict[str, Any] = {"micro_tokens": "auto", "checkpointing": "auto"}


def settle(job: Job) -> Train:
    """The job's settings with numbers for micro_tokens and a word for checkpointing.

    On a GPU the least checkpointing with which a useful micro-batch fits, and the largest such
    micro-batch; where none fits, the smallest there is. On a CPU, where large ones gain nothing,
    4096 tokens, or twice the longest row so that such rows can still share, and no checkpointing
    unless memory is short.
    """
    given = job.settings
    words: tuple[str, ...] = (given.checkpointing,)
    if given.checkpointing == "auto":
        words = _ways(given)
    for word in words:
        least = job.rows.longest if word == words[-1] else USEFUL_TOKENS
        settled = _with_tokens(job.change(checkpointing=word), least)
        if settled is not None:
            return settled
    tokens = job.rows.longest if given.micro_tokens == "auto" else given.micro_tokens
    return _changed(given, checkpointing=words[-1], micro_tokens=tokens)


def _ways(settings: Train) -> tuple[str, ...]:
    """What checkpointing may be; TRL's trainer for grpo checkpoints all layers or none."""
    return CHECKPOINTING if settings.objective != "grpo" else ("none", "full")


def _with_tokens(job: Job, least: int) -> Train | None:
    """With this checkpointing; None if it does not fit, or not with `least` tokens at once."""
    given, longest = job.settings.micro_tokens, job.rows.longest
    if given != "auto" or job.machine.is_cpu:
        tokens = max(USEFUL_TOKENS, 2 * longest) if given == "auto" else given
        fits = job.fits(job.held_tokens(tokens), FILLED)
        return _changed(job.settings, micro_tokens=tokens) if fits else None
    most = job.most_tokens(max(longest, MOST_TOKENS), FILLED)
    enough = most >= job.held_tokens(least)
    return _changed(job.settings, micro_tokens=most) if enough else None


def _changed(settings: Train, **values: Any) -> Train:
    return Train.model_validate(settings.model_dump() | values)


def largest_batches(job: Job) -> dict[str, int]:
    """For each checkpointing the most tokens that fit at once; 0 where the weights alone do not."""
    return {
        word: job.change(checkpointing=word).most_tokens(LONGEST_SEARCH)
        for word in _ways(job.settings)
    }


@dataclass(frozen=True)
class Change:
    """Something that makes a run fit, and with what it then would be run."""

    what: str
    """As the recipe has it: train.method: qlora."""
    job: Job

    def peak(self) -> int:
        """Bytes it would hold."""
        tokens = self.job.settings.micro_tokens
        assert tokens != "auto", "changes are settled"
        return self.job.memory(self.job.held_tokens(tokens))["peak"]


def is_fitting(job: Job) -> bool:
    """Whether a settled job fits."""
    tokens = job.settings.micro_tokens
    assert tokens != "auto", "settle it first"
    return job.fits(job.held_tokens(tokens))


def find_changes(job: Job, gpus: dict[str, Gpu]) -> list[Change]:
    """What would make a job fit, from the smallest change on; each was computed.

    Where it is enough to leave the choice to the plan, nothing else is named.
    """
    own = _fitting(_own_choices(job))
    return own or _fitting(_candidates(job, gpus))


def _fitting(candidates: Iterator[tuple[str, Job]]) -> list[Change]:
    settled = [(what, replace(job, settings=settle(job))) for what, job in candidates]
    return [Change(what, job) for what, job in settled if is_fitting(job)]


def _own_choices(job: Job) -> Iterator[tuple[str, Job]]:
    yield from _try(job, "train.checkpointing: auto", checkpointing="auto")
    yield from _try(job, "train.micro_tokens: auto", micro_tokens="auto")
    yield from _try(job, "train.micro_tokens: auto and train.checkpointing: auto", **FREE)


def _candidates(job: Job, gpus: dict[str, Gpu]) -> Iterator[tuple[str, Job]]:
    yield from _try(job, "train.optimizer: adamw_8bit", optimizer="adamw_8bit", **FREE)
    if job.settings.method == "lora":
        yield from _try(job, "train.method: qlora", method="qlora", **FREE)
    roomy = job.change(**FREE)
    longest = roomy.change(checkpointing="full").most_tokens(job.rows.longest)
    if 0 < longest < job.rows.longest:
        shorter = replace(roomy, rows=job.rows.with_longest(longest))
        yield f"data.max_tokens: {longest}", shorter
    if not job.machine.is_cpu:
        yield from _other_machines(roomy, gpus)


def _other_machines(job: Job, gpus: dict[str, Gpu]) -> Iterator[tuple[str, Job]]:
    """More devices with all of it spread over them, then larger ones, cheapest first."""
    machine = job.machine
    for devices in (2, 4, 8):
        if devices >= max(2, machine.devices):
            several = replace(machine, devices=devices)
            yield f"{devices} devices with FSDP2", replace(job, machine=several, sharding="fsdp2")
    for name, gpu in sorted(gpus.items(), key=lambda item: item[1].usd_per_hour):
        other = gpu_machine(name, gpu, machine.devices)
        if other.memory_bytes > machine.memory_bytes:
            yield f"plan.gpu: {name}", replace(job, machine=other)


def _try(job: Job, what: str, **values: Any) -> Iterator[tuple[str, Job]]:
    """The changed job, if the recipe allows it and it is another."""
    try:
        changed = job.change(**values)
    except ValueError:
        return
    if changed != job:
        yield what, changed


def relief(job: Job) -> str:
    """What to set when a settled job's prediction was too low: the next smaller one."""
    settings, longest = job.settings, job.rows.longest
    assert settings.micro_tokens != "auto", "settle it first"
    if job.held_tokens(settings.micro_tokens) > longest:
        half = max(longest, job.held_tokens(settings.micro_tokens) // 2)
        return f"train.micro_tokens: {half}"
    if settings.checkpointing != "full":
        return "train.checkpointing: full"
    if settings.method == "lora":
        return "train.method: qlora"
    if settings.method == "full" and settings.optimizer == "adamw":
        return "train.optimizer: adamw_8bit"
    return f"data.max_tokens: {longest // 2}"
