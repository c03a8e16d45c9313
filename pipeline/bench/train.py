"""The train stage beside stock TRL on the same rows, in one run: supervised tokens a second."""

import json
import logging
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.bench.dialogues import write_support, write_tool_chats
from pipeline.bench.machine import describe_machine, find_versions, tell_conditions
from pipeline.bench.measure import measure
from pipeline.data.prepare import prepare
from pipeline.recipe import Data, Train
from pipeline.run import write_json

log = logging.getLogger(__name__)

RESULT = "bench-train.json"
KINDS = {
    "tree": "`packing: tree`",
    "padded": "TRL, rows padded",
    "bfd": "TRL, `packing=True` (bfd)",
}
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
_PACKAGES = ("torch", "transformers", "trl", "peft")
_NUM_SUPPORT, _NUM_CHATS = 24, 4
_SEED = 0


@dataclass(frozen=True)
class Timing:
    """One training: a line of the table."""

    rows: str
    kind: str
    seconds: float
    first_step_seconds: float
    """From the start of loading the base."""
    supervised_tokens: int
    tokens: int
    """Through the model, without padding."""
    loss: float
    peak_mib: float

    @property
    def rate(self) -> float:
        """Supervised tokens a second."""
        return self.supervised_tokens / self.seconds


def bench_train(base: Path, support: Path, folder: Path) -> list[Timing]:
    """Train each set of rows each way, one process after the other; writes bench-train.json.

    The sets are conversations of several turns of the support set, with its tools in every one, and
    generated chats of four questions with calls under one system text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_support(support, folder / "support.jsonl", _NUM_SUPPORT)
    write_tool_chats(folder / "tool-chats.jsonl", _NUM_CHATS, _SEED)
    write_tool_chats(folder / "held-out.jsonl", 1, _SEED + 1)
    timings = []
    for name in ("support", "tool-chats"):
        data = Data.model_validate(
            {
                "sources": [{"path": str(folder / f"{name}.jsonl")}],
                "eval": {"path": str(folder / "held-out.jsonl")},
            }
        )
        prepare(data, base, _SEED, folder / name)
        timings += [_fit(name, kind, base, folder) for kind in KINDS]
    write_json(folder / RESULT, [asdict(timing) for timing in timings])
    return timings


def _fit(name: str, kind: str, base: Path, folder: Path) -> Timing:
    log.info("training on %s, %s", name, kind)
    command = [sys.executable, "-m", "pipeline.bench.fit", kind, str(base.resolve())]
    command += [str((folder / name / "train.arrow").resolve()), SETTINGS.model_dump_json()]
    measured = measure(command, folder, os.environ | {"HF_HUB_OFFLINE": "1"})
    said = json.loads(measured.output.splitlines()[-1])
    return Timing(name, kind, peak_mib=measured.peak_mib, **said)


def table(timings: list[Timing]) -> str:
    """The result in Markdown, each compared with `packing: tree` on the same rows."""
    lines = [
        "| rows | how | tokens | supervised | seconds | supervised/s | ours is faster "
        "| loss | first step, s | peak, MiB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    ours = {timing.rows: timing for timing in timings if timing.kind == "tree"}
    for timing in timings:
        ratio = ours[timing.rows].rate / timing.rate
        lines.append(
            f"| {timing.rows} | {KINDS[timing.kind]} | {timing.tokens} "
            f"| {timing.supervised_tokens} | {timing.seconds:.0f} | {timing.rate:.1f} "
            f"| {ratio:.2f}x | {timing.loss:.3f} | {timing.first_step_seconds:.0f} "
            f"| {timing.peak_mib:.0f} |"
        )
    conditions = tell_conditions(describe_machine(), find_versions(_PACKAGES))
    return "\n".join([*lines, "", conditions])
