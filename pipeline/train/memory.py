"""How much memory a training takes; and when it is too much, which line of the plan was wrong."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import RunError

STATIC = ("weights", "adapter", "optimizer", "gradients", "fixed")
"""Lines of a plan that do not depend on the tokens."""
# How torch's CPU allocator says it; there is no class of its own.
CPU_WORDS = "can't allocate memory"


def peak_bytes() -> int:
    """The most memory held: of the accelerator if there is one, else of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024


def find_gpu() -> tuple[str, int] | None:
    """The driver's name of this process's GPU and its memory in bytes; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return str(properties.name), int(properties.total_memory)


@contextmanager
def memory_told(predicted: Mapping[str, Any]) -> Iterator[None]:
    """In this block running out of memory is a RunError that compares with the plan.

    `predicted` is what the plan said of this run.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(explain(predicted, str(error))) from error
    except RuntimeError as error:
        if CPU_WORDS not in str(error):
            raise
        raise RunError(explain(predicted, str(error))) from error


def explain(predicted: Mapping[str, Any], said: str, held: int | None = None) -> str:
    """The sentence; `said` is the allocator's own, `held` the most bytes there were (default: as
    torch counts them on the GPU)."""
    lines = predicted["memory_bytes"]
    if held is None:
        held = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    where = predicted["machine"]["name"]
    room = predicted["machine"]["memory_bytes"]
    advice = f"set {predicted['if_too_large']}"
    if lines["peak"] > room:
        changes = predicted["changes"]
        advice = f"set {changes[0]['set']}" if changes else "take a smaller base"
        return (
            f"out of memory, as the plan said: {_gb(lines['peak'])} predicted, {_gb(room)} usable "
            f"on {where}; {advice}"
        )
    asked = _asked(said)
    needed = f", and {_gb(held + asked)} were needed" if held and asked else ""
    wrong = _most_likely(lines, held, asked)
    return (
        f"out of memory on {where}: the plan predicted {_gb(lines['peak'])}{needed}; most likely "
        f"its line {wrong!r} is too low, {_gb(lines[wrong])}; {advice}, and see that nothing else "
        f"holds memory there"
    )


def _most_likely(lines: Mapping[str, int], held: int, asked: int) -> str:
    """Before what does not depend on tokens is there, its largest line; then by what was asked."""
    static = {name: lines[name] for name in STATIC}
    if held and held + asked < sum(static.values()):
        return max(static, key=lambda name: static[name])
    for name in ("logits", "mask"):
        # They come in a few large pieces, activations in many small ones.
        is_large = lines[name] > lines["activations"] / 40
        if is_large and lines[name] / 6 <= asked <= 2 * lines[name]:
            return name
    return "activations"


def _asked(said: str) -> int:
    """How much was wanted last, from torch's sentences; 0 if they do not say."""
    words = said.replace("bytes", "B").split()
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    for at, word in enumerate(words[:-2]):
        unit = words[at + 2].rstrip(".,")
        if word == "allocate" and unit in units:
            return int(float(words[at + 1]) * units[unit])
    return 0


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
