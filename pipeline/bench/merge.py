"""`pipeline merge` beside a copy of the same files and PEFT's own merge, in one run."""

import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import Qwen3ForCausalLM

from pipeline.base.checkpoint import Tensor, read_layout
from pipeline.base.names import SHAPES
from pipeline.base.nf4 import quantised_weights
from pipeline.base.random import make_random, shape_config
from pipeline.bench.machine import describe_machine, find_versions, tell_conditions
from pipeline.bench.measure import measure, read_high_water
from pipeline.errors import PipelineError
from pipeline.run import write_json

log = logging.getLogger(__name__)

RESULT = "bench-merge.json"
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
_GB, _GIB = 1e9, 1 << 30
# Of PEFT's merge: the model, what one layer's product takes, and the libraries.
_PEFT_SHARE, _PEFT_BYTES = 1.1, 3 << 29


@dataclass(frozen=True)
class Timing:
    """One line of the table."""

    base: str
    base_bytes: int
    """Of its weights."""
    what: str
    seconds: float
    """Of the whole process, until all is on the disk."""
    peak_bytes: int
    """The process's VmHWM."""
    disk_bytes: int
    """The most that was written and lay there at once."""


def bench_merge(base: Path, rank: int, folder: Path) -> list[Timing]:
    """Write a base again in each way, one process after the other; writes bench-merge.json.

    The adapter is on every linear layer, with random factors. Where PEFT's merge does not fit the
    memory, a smaller shape is made for it, with a copy and our merge of that beside it. Raises
    PipelineError for a disk that cannot hold the adapter and one output.
    """
    if sys.platform != "linux":
        raise PipelineError("this benchmark reads Linux's /proc and tells its page cache")
    folder.mkdir(parents=True, exist_ok=True)
    fits = peft_bytes(count_bytes(base)) < psutil.virtual_memory().available
    timings = list(_time(base, rank, folder, with_peft=fits))
    if not fits:
        smaller = folder / _choose_shape(psutil.virtual_memory().available)
        log.info("PEFT's merge of %s does not fit the memory: %s for that", base, smaller.name)
        make_random(smaller, smaller.name)
        timings += _time(smaller, rank, folder, with_peft=True)
        shutil.rmtree(smaller)
    write_json(folder / RESULT, [asdict(timing) for timing in timings])
    return timings


def count_bytes(base: Path) -> int:
    """Of all weights of a checkpoint."""
    return sum(path.stat().st_size for path in base.glob("*.safetensors"))


def peft_bytes(base_bytes: int) -> float:
    """About what PEFT's merge and saving hold at once."""
    return _PEFT_SHARE * base_bytes + _PEFT_BYTES


def write_adapter(base: Path, rank: int, out: Path) -> None:
    """An adapter in PEFT's layout on every linear layer, in float32, with random factors."""
    targets, generator = quantised_weights(base), torch.Generator().manual_seed(0)
    factors: dict[str, torch.Tensor] = {}
    for tensor in _tensors(base):
        if tensor.name in targets:
            module = f"base_model.model.{tensor.name.removesuffix('.weight')}"
            rows, columns = tensor.shape
            a = torch.randn(rank, columns, generator=generator) / columns**0.5
            b = torch.randn(rows, rank, generator=generator) * 0.01
            factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    out.mkdir()
    names = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in targets})
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=names,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name,
        inference_mode=True,
    )
    config.save_pretrained(out)
    save_file(factors, out / "adapter_model.safetensors", metadata={"format": "pt"})


def _tensors(base: Path) -> Iterator[Tensor]:
    for shard in read_layout(base).values():
        yield from shard


def _choose_shape(available: int) -> str:
    """The largest shape whose merge by PEFT fits so many bytes."""
    for shape in reversed(SHAPES):
        with torch.device("meta"):
            model = Qwen3ForCausalLM(shape_config(shape))
        if peft_bytes(sum(2 * weight.numel() for weight in model.parameters())) < available:
            return shape
    raise PipelineError(f"PEFT's merge of no shape fits {available / _GB:.1f} GB of memory")


def _time(base: Path, rank: int, folder: Path, *, with_peft: bool) -> Iterator[Timing]:
    adapter, out = folder / f"{base.name}-adapter", folder / "out"
    write_adapter(base, rank, adapter)
    needed, free = 1.05 * count_bytes(base), shutil.disk_usage(folder).free
    if free < needed:
        raise PipelineError(
            f"{folder}: an output needs {needed / _GB:.1f} GB and {free / _GB:.1f} GB are free"
        )
    python = [sys.executable, "-m"]
    paths = [str(path.resolve()) for path in (base, adapter, out)]
    ours = [*python, "pipeline", "merge", paths[1], "--base", paths[0], "--out", paths[2]]
    ways = {
        "a copy, with fsync": [*python, "pipeline.bench.copying", paths[0], paths[2]],
        "its sha256, once for a run": [*python, "pipeline.bench.hashing", paths[0], paths[2]],
        "ours": ours,
        "ours, over the base in 4 bit": [*ours, "--trained-on", "nf4"],
        "PEFT's merge_and_unload": [*python, "pipeline.bench.peft_merge", *paths],
    }
    for what, command in ways.items():
        if with_peft or not what.startswith("PEFT"):
            yield _measure(what, command, base, out)
    shutil.rmtree(adapter)


def _measure(what: str, command: Sequence[str], base: Path, out: Path) -> Timing:
    log.info("measuring %s of %s", what, base.name)
    _forget(base)
    written = [0]

    def look(pid: int) -> int:
        written.append(_count_written(out))
        return read_high_water(pid)

    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    measured = measure(command, out.parent, environment, look)
    written.append(_count_written(out))
    shutil.rmtree(out)
    peak = round(measured.peak_mib * (1 << 20))
    log.info("%.1f seconds, %.2f GiB", measured.seconds, peak / _GIB)
    return Timing(base.name, count_bytes(base), what, measured.seconds, peak, max(written))


def _forget(base: Path) -> None:
    """Take a base's files out of the page cache, so that each way reads them from the disk."""
    for path in base.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a page that is not written yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _count_written(out: Path) -> int:
    """Bytes under a name and under those it has before it is whole."""
    total = 0
    for path in out.parent.glob(f"{out.name}*/**/*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # it has just got another name
            continue
    return total


def table(timings: Sequence[Timing]) -> str:
    """The result in Markdown, each compared with the copy of the same files."""
    lines = [
        "| base | weights, GB | what | seconds | × copy | peak memory, GiB | peak disk, GB |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    copy = timings[0]
    for timing in timings:
        copy = timing if timing.what.startswith("a copy") else copy
        lines.append(
            f"| {timing.base} | {timing.base_bytes / _GB:.2f} | {timing.what} "
            f"| {timing.seconds:.1f} | {timing.seconds / copy.seconds:.2f} "
            f"| {timing.peak_bytes / _GIB:.2f} | {timing.disk_bytes / _GB:.2f} |"
        )
    said = "Whole processes, each with the base's files out of the page cache at its start."
    return "\n".join(
        [*lines, "", said, tell_conditions(describe_machine(), find_versions(_PACKAGES))]
    )
