"""GGUF files for llama.cpp of checkpoints and adapters that have none: made once, and kept."""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

from pipeline.base.cache import kept
from pipeline.errors import PipelineError
from pipeline.run import hash_value
from pipeline.serve.offer.hashes import hash_once

log = logging.getLogger(__name__)

_SUFFIXES = (".json", ".jinja", ".safetensors", ".txt", ".model")
_VERSION = 1
"""To be raised with what is written: a file of an older version is not used."""


def gguf_of(checkpoint: Path) -> Path:
    """A checkpoint in bf16, in which nothing of it is lost: so its certificate is good for it, too.

    A smaller format is a recipe's to ask for in `export.gguf`, and is certified by itself.
    """
    files = (file for file in checkpoint.iterdir() if file.suffix in _SUFFIXES)
    name = f"gguf-{_short_hash(hash_once(checkpoint, files))}"
    _make(name, ["--checkpoint", str(checkpoint.resolve())], checkpoint)
    return kept(name) / "model-bf16.gguf"


def gguf_adapter_of(adapter: Path, base: Path) -> Path:
    """A LoRA adapter in PEFT's layout as GGUF, to be put on the checkpoint `base`."""
    parts = (adapter / "adapter_config.json", adapter / "adapter_model.safetensors")
    found = [hash_once(adapter, parts), hash_once(base, [base / "config.json"])]
    name = f"gguf-lora-{_short_hash(found)}"
    where = ["--checkpoint", str(base.resolve()), "--adapter", str(adapter.resolve())]
    _make(name, where, adapter)
    return kept(name) / "adapter.gguf"


def _make(name: str, arguments: list[str], source: Path) -> None:
    if kept(name).is_dir():
        return
    for needed in ("torch", "transformers", "gguf"):
        if importlib.util.find_spec(needed) is None:
            raise PipelineError(
                f"{source} is not GGUF, and {needed} is not installed to make it so: "
                "run pip install '.[train]', or `pipeline export` where it is"
            )
    log.info("making a GGUF file of %s, once", source)
    command = [sys.executable, "-m", "pipeline.export.on_demand", "--name", name, *arguments]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # it ends when this pipe does: also when this process is killed
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        reason = (said.strip().splitlines() or ["no reason given"])[-1]
        raise PipelineError(f"{source} could not be made GGUF: {reason}")


def _short_hash(value: object) -> str:
    return hash_value([_VERSION, value])[:16]
