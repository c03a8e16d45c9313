"""`pipeline data` beside TRL's own preparation of the same conversations, in one run."""

import json
import logging
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.base.names import SHAPES
from pipeline.base.qwen3 import qwen3_dialogue
from pipeline.bench.conversations import write_conversations
from pipeline.bench.machine import describe_machine, find_versions, tell_conditions
from pipeline.bench.measure import Measured, measure
from pipeline.errors import PipelineError
from pipeline.run import read_json, write_json

log = logging.getLogger(__name__)

RESULT = "bench-data.json"
_NUM_HELD_OUT = 100
_RECIPE = "bench-data.yaml"
_OURS = ("-m", "pipeline", "data", _RECIPE)
_PACKAGES = ("datasets", "tokenizers", "transformers", "trl")


@dataclass(frozen=True)
class Timing:
    """One line of the table."""

    what: str
    rows: int
    seconds: float
    """What is compared: our whole command; of TRL's process the preparation alone."""
    process_seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Result:
    """Everything a run of the benchmark has found, in the order it was measured."""

    ours: Timing
    again: Timing
    """With unchanged inputs."""
    trl: tuple[Timing, ...]
    machine: str
    versions: dict[str, str]


def bench_data(num_conversations: int, folder: Path) -> Result:
    """Measure in an empty folder, one process after the other; writes bench-data.json into it.

    Raises PipelineError if one of them fails or makes other rows than it should.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise PipelineError(f"{folder} is not empty: a benchmark begins with nothing prepared")
    write_inputs(folder, num_conversations)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    ours = _time_ours("`pipeline data`, the whole command", num_conversations, folder, environment)
    again = _time_ours("the same again, unchanged inputs", num_conversations, folder, environment)
    trl = tuple(
        _time_trl(num_proc, num_conversations, folder, environment)
        for num_proc in (0, os.cpu_count() or 1)
    )
    result = Result(ours, again, trl, describe_machine(), find_versions(_PACKAGES))
    write_json(folder / RESULT, asdict(result))
    return result


def write_inputs(folder: Path, num_conversations: int) -> None:
    """Write conversations, a base without weights and a recipe, as a user would have them."""
    log.info("writing %d conversations", num_conversations)
    write_conversations(folder / "train.jsonl", 0, num_conversations)
    write_conversations(folder / "held-out.jsonl", num_conversations, _NUM_HELD_OUT)
    base = shutil.copytree(qwen3_dialogue(), folder / "base")
    hidden, intermediate, layers, heads, tied = SHAPES["qwen3-8b"]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
    }
    write_json(base / "config.json", config)
    (folder / _RECIPE).write_text(
        "base: base\ndata: {sources: [{path: train.jsonl}], eval: {path: held-out.jsonl}}\n",
        encoding="utf-8",
    )


def _time_ours(what: str, num_rows: int, folder: Path, environment: dict[str, str]) -> Timing:
    made = folder / "runs" / "bench-data" / "data" / "train.arrow"
    before = made.stat() if made.exists() else None
    log.info("measuring %s", what)
    measured = measure([sys.executable, *_OURS], folder, environment)
    if before and made.stat().st_ino != before.st_ino:
        raise PipelineError("`pipeline data` with unchanged inputs prepared its rows again")
    rows = read_json(made.with_name("report.json"))["train"]["rows"]
    return _timing(what, rows, num_rows, measured, measured.seconds)


def _time_trl(num_proc: int, num_rows: int, folder: Path, environment: dict[str, str]) -> Timing:
    what = f"TRL's preparation, dataset_num_proc={num_proc or None}"
    log.info("measuring %s", what)
    cache = {"HF_DATASETS_CACHE": str(folder / f"datasets-{num_proc}")}
    command = [sys.executable, "-m", "pipeline.bench.trl_data", "train.jsonl", "base"]
    measured = measure([*command, str(num_proc)], folder, environment | cache)
    said = json.loads(measured.output.splitlines()[-1])
    return _timing(what, said["rows"], num_rows, measured, said["prepare_seconds"])


def _timing(what: str, rows: int, num_rows: int, measured: Measured, seconds: float) -> Timing:
    if rows != num_rows:
        raise PipelineError(f"{what}: {num_rows} conversations became {rows} rows")
    return Timing(what, rows, seconds, measured.seconds, measured.peak_mib)


def table(result: Result) -> str:
    """The result in Markdown: a line each, how TRL's compare, and what it was measured on."""
    lines = [
        "| what | rows | seconds | µs a row | whole process, s | peak memory, MiB |",
        "|---|--:|--:|--:|--:|--:|",
        *(_line(timing) for timing in (result.ours, result.again, *result.trl)),
        "",
        *(_compare(timing, result.ours) for timing in result.trl),
        tell_conditions(result.machine, result.versions),
    ]
    return "\n".join(lines)


def _line(timing: Timing) -> str:
    microseconds = 1e6 * timing.seconds / timing.rows
    return (
        f"| {timing.what} | {timing.rows} | {timing.seconds:.1f} | {microseconds:.0f} "
        f"| {timing.process_seconds:.1f} | {timing.peak_mib:.0f} |"
    )


def _compare(theirs: Timing, ours: Timing) -> str:
    seconds = theirs.seconds / ours.seconds
    memory = theirs.peak_mib / ours.peak_mib
    return f"{theirs.what}: {seconds:.2f} times our seconds a row, {memory:.2f} times our memory."
