"""A checkpoint to one GGUF file, by llama.cpp's own converter in an interpreter of its own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.base.wheels import GGUF_CONVERTER, unpacked
from pipeline.errors import RunError

CONVERTED = ("f16", "bf16", "q8_0")
"""Formats the converter itself can write."""
_NEEDED = ("torch", "transformers", "sentencepiece")


def why_not_convert() -> str:
    """Why nothing can be converted here, in one sentence; empty if it can."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    return f"{', '.join(missing)} not installed: run pip install '.[train]'" if missing else ""


def convert(checkpoint: Path, file: Path, gguf_format: str) -> None:
    """Write a checkpoint as a GGUF file; RunError with the converter's last words if it cannot."""
    _check_whole(checkpoint)
    # The converter's wheel holds its own copy of the `gguf` package, which must not be imported
    # in this process: transformers' loader wants the one from the package index. And this folder
    # must not be on the path, or its files would stand in for modules of the same name.
    converter = Path(__file__).with_name("converter_child.py")
    command = [sys.executable, "-P", str(converter), str(checkpoint)]
    command += ["--outtype", gguf_format, "--outfile", str(file)]
    environment = os.environ | {"PYTHONPATH": str(unpacked(GGUF_CONVERTER)), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"{checkpoint} could not be converted to GGUF: {reason}")


def _check_whole(checkpoint: Path) -> None:
    """Refuse weights that are cut off, of which the converter would say something else."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            raise RunError(f"{file} is cut off or broken, make it again: {error}") from error
