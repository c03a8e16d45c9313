"""What a benchmark was measured on."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path


def find_versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of some installed packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def describe_machine() -> str:
    """Processor and cores, as the operating system names them."""
    name = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        lines = (line.partition(":") for line in facts.read_text("utf-8").splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name}, {os.cpu_count()} cores"


def tell_conditions(machine: str, versions: dict[str, str]) -> str:
    """Both in a sentence."""
    return f"Measured on {machine}; {', '.join(f'{n} {v}' for n, v in versions.items())}."
