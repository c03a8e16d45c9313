"""How vLLM's server is started: from which environment, with which options, and why it did not."""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import EngineError

ENVIRONMENT = Path(__file__).parents[2] / ".venv-vllm"
"""What `make engine-vllm` builds: vLLM wants other versions than training does."""
BASE_NAME = "(base)"
"""What vLLM calls the model without an adapter."""
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters; vllm/config/lora.py knows no others."""
_MAX_ADAPTERS_IN_A_BATCH = 4  # each takes GPU memory, used or not
_MAX_ADAPTERS_IN_MEMORY = 32  # the others are read from disk when they are asked for
# The line that ends a traceback, in vLLM's log or not; pydantic tells its reason in the next one.
_REASON = re.compile(
    r"^(?:\(\w+ pid=\d+\) )?(?:ERROR [^\]]*\] )?"
    r"(?:(?!pydantic)[\w.]*Error: |  Value error, )(.+?)(?:\. |\.?$| \[type=)",
    re.MULTILINE,
)


def find_python() -> Path:
    """The Python of an environment with vLLM; EngineError if there is none."""
    if (ENVIRONMENT / "ready").is_file():
        return ENVIRONMENT / "bin" / "python"
    if importlib.util.find_spec("vllm") is not None:
        return Path(sys.executable)
    raise EngineError("vLLM is not installed: run `make engine-vllm`")


def environment() -> dict[str, str]:
    """Beside what this process has."""
    return {
        "HF_HUB_OFFLINE": "1",  # it is given folders, and need not ask a hub about them
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        # Else it finds its own address by a connection to one on the internet.
        "VLLM_HOST_IP": os.environ.get("VLLM_HOST_IP", "127.0.0.1"),
        **({"VLLM_CPU_KVCACHE_SPACE": _cache_gib()} if _is_for_cpu() else {}),
    }


def launch_words(
    model: Path, slots: int, context_tokens: int | None, adapters: Mapping[str, Path]
) -> list[str]:
    """What `vllm serve` is told, but for the socket."""
    words = [str(model.resolve()), "--served-model-name", BASE_NAME]
    words += ["--max-num-seqs", str(slots), "--scheduling-policy", "priority"]
    if context_tokens is not None:
        room = read_config(model).get("max_position_embeddings", context_tokens)
        words += ["--max-model-len", str(min(context_tokens, room))]
    # Else the checkpoint's generation_config.json would fill in what a request leaves out.
    words += ["--generation-config", "vllm"]
    words += ["--structured-outputs-config", '{"backend": "guidance"}']
    words += ["--max-logprobs", "-1", "--enable-prompt-tokens-details"]
    words += ["--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    if _is_for_cpu():
        words.append("--enforce-eager")  # compiling takes half a minute, and gains little there
    return words + (_adapter_words(adapters) if adapters else [])


def end_ids(model: Path) -> tuple[int, ...]:
    """Of the tokens that end a turn: Qwen3 has two, and its tokenizer tells vLLM of one."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        ids = _read(model / name).get("eos_token_id")
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(dict.fromkeys(found))


def why_gone(log: Path) -> str:
    """One sentence for a server that ended before it was ready, from what it has said."""
    reason = _REASON.search(log.read_text(encoding="utf-8", errors="replace"))
    return f"vLLM did not start{f': {reason[1]}' if reason else ''}; see {log}"


def adapter_rank(config: Mapping[str, Any]) -> int:
    """The largest of an adapter, from its adapter_config.json."""
    return max(int(rank) for rank in [config["r"], *(config.get("rank_pattern") or {}).values()])


def max_rank(ranks: Sequence[int]) -> int:
    """What --max-lora-rank must be for adapters of these ranks."""
    return next((most for most in MAX_RANKS if most >= max(ranks)), MAX_RANKS[-1])


def read_config(model: Path) -> dict[str, Any]:
    """A checkpoint's config.json; EngineError where there is none."""
    found = _read(model / "config.json")
    if not found:
        raise EngineError(f"{model} is no checkpoint: vLLM needs config.json and weights in it")
    return found


def _adapter_words(adapters: Mapping[str, Path]) -> list[str]:
    configs = [_read(folder / "adapter_config.json") for folder in adapters.values()]
    for config, folder in zip(configs, adapters.values(), strict=True):
        if "r" not in config:
            raise EngineError(f"{folder} is no LoRA adapter as PEFT saves it")
    rank = max_rank([adapter_rank(config) for config in configs])
    words = ["--enable-lora", "--max-lora-rank", str(rank)]
    words += ["--max-loras", str(_MAX_ADAPTERS_IN_A_BATCH)]
    words += ["--max-cpu-loras", str(max(_MAX_ADAPTERS_IN_MEMORY, len(adapters)))]
    modules = ({"name": name, "path": str(path.resolve())} for name, path in adapters.items())
    return [*words, "--lora-modules", *map(json.dumps, modules)]


def _cache_gib() -> str:
    """For keys and values on a CPU: else vLLM would take nearly all memory, or refuse to start."""
    whole_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    return os.environ.get("VLLM_CPU_KVCACHE_SPACE", str(max(whole_gib // 4, 1)))


def _is_for_cpu() -> bool:
    ready = ENVIRONMENT / "ready"
    return ready.is_file() and ready.read_text(encoding="utf-8").strip() == "cpu"


def _read(file: Path) -> dict[str, Any]:
    """A JSON object, empty if the file is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
