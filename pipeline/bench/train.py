"""The train stage beside stock TRL on the same rows, in one run: tokens a second, memory, start."""

import json
import logging
import os
import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from pipeline.bench.dialogues import write_support, write_tool_chats
from pipeline.bench.machine import describe_machine, find_versions, tell_conditions
from pipeline.bench.measure import measure
from pipeline.data.prepare import prepare
from pipeline.data.rows import Row
from pipeline.data.store import ROWS, Writer, to_batch
from pipeline.environment import describe
from pipeline.plan.machine import found_machine
from pipeline.plan.memory import Load, hold
from pipeline.plan.shape import Shape, read_shape
from pipeline.recipe import Data, Plan, Train
from pipeline.run import write_json

log = logging.getLogger(__name__)

RESULT = "bench-train.json"
SETTINGS = Train(
    rank=16,
    alpha=32,
    batch_rows=16,
    micro_tokens=2048,
    epochs=1,
    # So small that nothing is learnt: all of them then have the base's own loss over all rows.
    learning_rate=1e-9,
    warmup_steps=0,
    schedule="constant_with_warmup",
    checkpointing="none",
)
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
_NUM_SUPPORT, _NUM_CHATS = 24, 4
_SEED = 0
_STEPS = 6
_GPU_ROW_TOKENS, _CPU_ROW_TOKENS = 4096, 256


@dataclass(frozen=True)
class Case:
    """One training: a line of the table."""

    rows: str
    how: str
    """Ours, or how TRL is told to do it."""
    kind: str
    """What `fit` calls that."""
    settings: Train


@dataclass(frozen=True)
class Timing:
    """What a training took."""

    rows: str
    how: str
    steps: int
    seconds: float
    first_step_seconds: float
    """From the start of loading the base."""
    later_seconds: float
    """All steps but the first, in which a GPU's kernels are compiled."""
    supervised_tokens: int
    tokens: int
    """Through the model, without padding."""
    loss: float
    peak_mib: float
    planned_mib: float | None = None
    mfu: float | None = None
    """Of the GPU's dense bf16 rate, by LoRA's own count of operations."""

    @property
    def rate(self) -> float:
        """Tokens through the model a second, of the later steps where all steps are alike."""
        if not self.rows.startswith("generated") or self.steps < 2:
            return self.tokens / self.seconds
        return self.tokens * (1 - 1 / self.steps) / self.later_seconds

    @property
    def supervised_rate(self) -> float:
        """Supervised tokens a second."""
        return self.rate * self.supervised_tokens / self.tokens


def bench_train(base: Path, support: Path, folder: Path) -> list[Timing]:
    """Train each set of rows each way, one process after the other; writes bench-train.json.

    On a GPU the rows are random ids that fill 4096 tokens each. On a CPU they are much shorter, and
    two sets of dialogues go before them: conversations of several turns of the support set, with
    its tools in every one, and chats of four questions with calls under one system text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    timings = []
    for case in gpu_cases() if torch.cuda.is_available() else cpu_cases():
        rows = folder / case.rows / "train.arrow"
        if not rows.is_file():
            make_rows(case.rows, base, support, folder)
        timings.append(_fit(case, rows, base, folder))
    write_json(folder / RESULT, [asdict(timing) for timing in timings])
    return timings


def cpu_cases() -> list[Case]:
    """Prefix trees beside what TRL offers on a CPU."""
    hows = {"tree": "ours", "padded": "TRL, rows padded", "bfd": "TRL, `packing=True` (bfd)"}
    sets = ("support", "tool-chats", "generated")
    return [Case(rows, how, kind, SETTINGS) for rows in sets for kind, how in hows.items()]


def gpu_cases() -> list[Case]:
    """LoRA and QLoRA beside TRL as it comes, which recomputes activations, and told not to."""
    cases = []
    for method in ("lora", "qlora"):
        chosen = {"method": method, "micro_tokens": 2 * _GPU_ROW_TOKENS}
        plain = SETTINGS.model_copy(update=chosen)
        ours = plain.model_copy(update={"compile": "layers"})
        stock = plain.model_copy(update={"checkpointing": "full"})
        cases += [
            Case("generated", f"ours, {method}", "tree", ours),
            Case("generated", f"TRL, {method}, its defaults", "equal", stock),
            Case("generated", f"TRL, {method}, nothing recomputed", "equal", plain),
        ]
    return cases


def make_rows(name: str, base: Path, support: Path, folder: Path) -> None:
    """Write a set of rows, by its name, as the train stage reads them."""
    if name == "generated":
        write_generated(base, folder / name / "train.arrow")
        return
    chats, held_out = folder / f"{name}.jsonl", folder / "held-out.jsonl"
    if name == "support":
        write_support(support, chats, _NUM_SUPPORT)
    else:
        write_tool_chats(chats, _NUM_CHATS, _SEED)
    write_tool_chats(held_out, 1, _SEED + 1)
    data = {"sources": [{"path": str(chats)}], "eval": {"path": str(held_out)}}
    prepare(Data.model_validate(data), base, _SEED, folder / name)


def write_generated(base: Path, path: Path) -> None:
    """Rows of random ids, all of one length, trained from the second id on."""
    path.parent.mkdir(parents=True)
    size = _GPU_ROW_TOKENS if torch.cuda.is_available() else _CPU_ROW_TOKENS
    vocabulary, draw = range(read_shape(base).vocabulary), random.Random(_SEED)
    with Writer(path, ROWS) as writer:
        for number in range(_STEPS * SETTINGS.batch_rows):
            first, *rest = draw.choices(vocabulary, k=size)
            row = Row([first], rest, f"generated:{number}", 1, "direct")
            writer.write(to_batch([row], ROWS))


def _fit(case: Case, rows: Path, base: Path, folder: Path) -> Timing:
    log.info("training on %s, %s", case.rows, case.how)
    command = [sys.executable, "-m", "pipeline.bench.fit", case.kind, str(base.resolve())]
    command += [str(rows.resolve()), case.settings.model_dump_json()]
    measured = measure(command, folder, os.environ | {"HF_HUB_OFFLINE": "1"})
    said = json.loads(measured.output.splitlines()[-1])
    gpu_bytes = said.pop("gpu_bytes")
    peak_mib = gpu_bytes / (1 << 20) if gpu_bytes else measured.peak_mib
    timing = Timing(case.rows, case.how, peak_mib=peak_mib, **said)
    planned_mib, mfu = _predict(case, timing, read_shape(base))
    return replace(timing, planned_mib=planned_mib, mfu=mfu)


def _predict(case: Case, timing: Timing, shape: Shape) -> tuple[float | None, float | None]:
    """What the plan says ours will hold, in MiB, and the MFU; None where there is none to tell."""
    if not torch.cuda.is_available():
        return None, None
    planned_mib = None
    if case.how.startswith("ours"):
        micro_tokens = int(case.settings.micro_tokens)
        lines = hold(case.settings, shape, Load(micro_tokens, micro_tokens, is_cpu=False))
        planned_mib = sum(lines.values()) / (1 << 20)
    gpu = found_machine(torch.cuda.get_device_name(), 0, 1, Plan()).gpu
    if gpu is None:
        return planned_mib, None
    work = timing.rate * count_operations(shape, _GPU_ROW_TOKENS)
    return planned_mib, work / (gpu.bf16_tflops * 1e12)


def count_operations(shape: Shape, row_tokens: int) -> float:
    """Of LoRA, a token: forward and the gradient of what goes in, none of the frozen weights.

    2 each for a weight that is multiplied with, the head's included; of attention 2 products
    forward and 4 backward, over the half of the row that a token sees on average. Nothing is
    counted for the adapter, nor for what is computed twice to save memory.
    """
    weights = 4 * (shape.num_linear() + shape.num_head())
    return weights + 6 * shape.layers * shape.queries * row_tokens


def table(timings: list[Timing]) -> str:
    """The result in Markdown, each compared with ours on the same rows before it."""
    lines = [
        "| rows | how | tokens | supervised | seconds | tokens/s | supervised/s | ours is faster "
        "| MFU | loss | first step, s | peak, MiB | planned |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    ours = None
    for timing in timings:
        ours = timing if ours is None or timing.how.startswith("ours") else ours
        ratio = ours.supervised_rate / timing.supervised_rate
        mfu = f"{timing.mfu:.1%}" if timing.mfu else ""
        planned = f"{timing.planned_mib:.0f}" if timing.planned_mib else ""
        lines.append(
            f"| {timing.rows} | {timing.how} | {timing.tokens} | {timing.supervised_tokens} "
            f"| {timing.seconds:.0f} | {timing.rate:.1f} | {timing.supervised_rate:.1f} "
            f"| {ratio:.2f}x | {mfu} | {timing.loss:.3f} | {timing.first_step_seconds:.0f} "
            f"| {timing.peak_mib:.0f} | {planned} |"
        )
    gpus = "; ".join(describe()["hardware"]["gpus"])
    where = f"{gpus}, {describe_machine()}" if gpus else describe_machine()
    return "\n".join([*lines, "", tell_conditions(where, find_versions(_PACKAGES))])
