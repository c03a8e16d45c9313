"""Memory, tokens, time and cost before a GPU is rented: from a config and counts, no weights."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.plan.gpus import GPUS
from pipeline.plan.job import Job
from pipeline.plan.machine import Machine
from pipeline.plan.rows import read_rows
from pipeline.plan.settle import find_changes, is_fitting, largest_batches, relief, settle
from pipeline.plan.shape import read_shape
from pipeline.plan.work import count_work, reply_seconds, step_seconds
from pipeline.recipe import Gpu, Train

__all__ = ["predict", "read_job", "settle"]


def read_job(
    settings: Train,
    base: Path,
    report: Mapping[str, Any],
    machine: Machine,
    questions: int = 0,
) -> Job:
    """A run on a machine, from the base's config.json and the data stage's report.

    `questions` is how many grpo asks. Raises BaseError for a config without sizes, RunError where
    there is nothing of what the objective learns from.
    """
    return Job(settings, read_shape(base), read_rows(settings, report, questions), machine)


def predict(job: Job, gpus: Mapping[str, Gpu] = GPUS) -> dict[str, Any]:
    """What a job will hold, in bytes on each device, and compute; as plain values.

    `operations_per_token` is what learning takes, and `peak_tokens_per_s` what all devices would do
    of that at their full rate; MFU is the part of it that is reached. `operations` is all that is
    computed in the run, recomputing included.
    """
    job = replace(job, settings=settle(job))
    settings, rows = job.settings, job.rows
    assert settings.micro_tokens != "auto", "settle has made it a number"
    held = job.held_tokens(settings.micro_tokens)
    work = count_work(settings, job.shape, rows, job.machine.is_cpu)
    fits = is_fitting(job)
    return {
        "machine": _describe(job.machine),
        "objective": settings.objective,
        "settings": {
            "micro_tokens": settings.micro_tokens,
            "checkpointing": settings.checkpointing,
        },
        "memory_bytes": job.memory(held),
        "fits": fits,
        "changes": [] if fits else _changes(job, dict(gpus)),
        "sharded_bytes": _sharded(job, held),
        "if_too_large": relief(job),
        "largest_micro_tokens": largest_batches(job),
        "held_tokens": held,
        "parameters": {
            "base": job.shape.num_weights(),
            "trained": job.shape.num_trained(settings),
        },
        "row_tokens_per_epoch": rows.tokens,
        "tokens_per_epoch": rows.shared,
        "supervised_tokens_per_epoch": rows.supervised,
        "steps": job.num_steps,
        "tokens_per_step": round(job.step_tokens),
        "operations_per_token": work.useful,
        "peak_tokens_per_s": _peak_rate(job.machine, work.useful),
        "operations": work.computed * job.step_tokens * job.num_steps,
        **_time(job, held),
    }


def _describe(machine: Machine) -> dict[str, Any]:
    return {
        "name": machine.name,
        "devices": machine.devices,
        "memory_bytes": machine.memory_bytes,
    }


def _peak_rate(machine: Machine, operations: float) -> float | None:
    if machine.gpu is None:
        return None
    return machine.devices * machine.gpu.bf16_tflops * 1e12 / operations


def _changes(job: Job, gpus: dict[str, Gpu]) -> list[dict[str, Any]]:
    return [{"set": c.what, "peak_bytes": c.peak()} for c in find_changes(job, gpus)]


def _sharded(job: Job, held: int) -> dict[str, int] | None:
    """With several devices, what each would hold under FSDP2 instead of DDP."""
    if job.machine.devices == 1:
        return None
    return replace(job, sharding="fsdp2").memory(held)


def _time(job: Job, held: int) -> dict[str, float | None]:
    settings, machine = job.settings, job.machine
    work = count_work(settings, job.shape, job.rows, machine.is_cpu)
    step = step_seconds(settings, job.shape, job.step_tokens, held, work, machine)
    if step is not None and settings.objective == "grpo":
        step += reply_seconds(settings, job.shape, machine) or 0.0
    seconds = None if step is None else step * job.num_steps
    price = machine.gpu.usd_per_hour * machine.devices if machine.gpu else None
    cost = None if price is None or seconds is None else seconds / 3600 * price
    return {"seconds_per_step": step, "seconds": seconds, "usd": cost}
