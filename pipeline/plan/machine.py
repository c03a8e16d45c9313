"""What a run is planned for: some GPUs of the table, those that were found, or this machine."""

import difflib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RecipeError
from pipeline.plan.gpus import GPUS
from pipeline.recipe import Gpu, Plan

GPU_MARGIN = 0.06
"""Of a GPU's memory: what its allocator loses in gaps."""
CPU_MARGIN = 0.1
"""Of a machine's memory: what its system and other programs need."""


@dataclass(frozen=True)
class Machine:
    """Some devices of one kind."""

    name: str
    memory_bytes: int
    """What a run may take, on each device."""
    devices: int = 1
    gpu: Gpu | None = None
    """Rates and price; None for a CPU, and for a GPU that is in no table."""
    is_cpu: bool = False
    cores: int = 1

    def describe(self) -> str:
        """In words: 2 x H100."""
        return f"{self.devices} x {self.name}" if self.devices > 1 else self.name


def planned_machine(plan: Plan) -> Machine:
    """The GPUs the recipe plans for; RecipeError with close names for one that is unknown."""
    known = known_gpus(plan)
    name = next((n for n in known if _words(n) == _words(plan.gpu)), None)
    if name is None:
        close = [n for n in known if _words(plan.gpu) & _words(n)]
        close = close or difflib.get_close_matches(plan.gpu, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
        raise RecipeError(f"no GPU is named {plan.gpu!r}; {hint} Others go into plan.gpus")
    return gpu_machine(name, known[name], plan.devices)


def gpu_machine(name: str, gpu: Gpu, devices: int = 1) -> Machine:
    """GPUs as a table has them."""
    return Machine(name, int(gpu.memory_gb * 1e9 * (1 - GPU_MARGIN)), devices, gpu)


def found_machine(name: str, memory_bytes: int, devices: int, plan: Plan) -> Machine:
    """GPUs that are there, by the driver's name and true memory: NVIDIA A100-SXM4-80GB."""
    known = known_gpus(plan)
    fitting = [n for n in known if _words(n) <= _words(name)]
    best = max(fitting, key=lambda n: len(_words(n)), default=None)
    usable = int(memory_bytes * (1 - GPU_MARGIN))
    return Machine(best or name, usable, devices, known[best] if best else None)


def this_machine(processes: int = 1) -> Machine:
    """The CPU, with the part of the system's memory that is a process's: what is free changes."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # a container may have less than its host; without a limit the file is not there, or says "max"
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    cores = int(threads) if threads.isdecimal() else (os.cpu_count() or 1) // processes
    usable = int(total * (1 - CPU_MARGIN)) // processes
    return Machine("CPU", usable, processes, is_cpu=True, cores=max(1, cores))


def known_gpus(plan: Plan) -> Mapping[str, Gpu]:
    """The package's table and the recipe's own entries, which win."""
    return {**GPUS, **plan.gpus}


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))
