"""Which engine: one of ours by what the machine has, or the dialect that a URL speaks."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.engine.connection import Connection
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.protocol import Engine
from pipeline.engine.vllm import Vllm
from pipeline.engine.vllm_launch import find_python
from pipeline.errors import EngineError

Kind = Literal["llamacpp", "vllm", "elsewhere"]
KEY_VARIABLE = "PIPELINE_ENGINE_KEY"
"""What holds the API key of engines elsewhere; on a command line everybody could read it."""


@dataclass(frozen=True)
class EngineChoice:
    """An engine, and why."""

    kind: Kind
    why: str = ""
    """Empty if the user has said so."""
    urls: tuple[str, ...] = ()
    """Of `elsewhere`."""


def choose_engine(word: str, *, is_gguf: bool = False) -> EngineChoice:
    """What auto, llamacpp, vllm or URLs with commas between mean here.

    `is_gguf` is of what is to be served: vLLM has no GGUF. EngineError for any other word.
    """
    if word == "auto":
        return _choose_by_machine(is_gguf)
    if word == "llamacpp":
        return EngineChoice("llamacpp")
    if word == "vllm":
        if is_gguf:
            raise EngineError("vLLM does not load GGUF files: give its checkpoint, or llamacpp")
        return EngineChoice("vllm")
    urls = tuple(dict.fromkeys(_as_url(part.strip()) for part in word.split(",") if part.strip()))
    if not urls:
        raise EngineError("--engine is empty: give auto, llamacpp, vllm or a URL")
    return EngineChoice("elsewhere", urls=urls)


async def connect(url: str, api_key: str, part: int = 0, num_parts: int = 1) -> Engine:
    """Speak to a server somebody else runs, in llama.cpp's own dialect or else in vLLM's.

    The part is one of the processes of ours that do.
    """
    asking = Connection("the engine", url, api_key=api_key)
    try:
        found = await asking.get("/props")
    except EngineError:
        if not await asking.answers("/v1/models"):
            raise
        found = {}
    finally:
        await asking.close()
    if "default_generation_settings" in found:
        return await LlamaCpp.at(url, api_key, part, num_parts)
    return await Vllm.at(url, api_key)


def _choose_by_machine(is_gguf: bool) -> EngineChoice:
    if is_gguf:
        return EngineChoice("llamacpp", "it is a GGUF file")
    if not _has_cuda():
        return EngineChoice("llamacpp", "there is no CUDA device")
    if not _has_vllm():
        return EngineChoice("llamacpp", "vLLM is not installed; make engine-vllm builds it")
    return EngineChoice("vllm", "there are a CUDA device and vLLM")


def _has_cuda() -> bool:
    """Asked of the driver: torch would take seconds, and is not there."""
    if Path("/dev/nvidia0").exists():
        return True
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU" in listed.stdout


def _has_vllm() -> bool:
    try:
        find_python()
    except EngineError:
        return False
    return True


def _as_url(word: str) -> str:
    if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", word):
        raise EngineError(f"engine {word!r} is unknown: give auto, llamacpp, vllm or a URL")
    if "@" in word:
        raise EngineError(f"an engine's URL holds a password: put its key into {KEY_VARIABLE}")
    # OpenAI's clients are given the address with this ending.
    return word.rstrip("/").removesuffix("/v1")
