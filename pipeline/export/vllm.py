"""Whether vLLM loads an adapter over its base, and with which options.

The rules are those of vLLM 0.32: `PEFTHelper.validate_legal` in vllm/lora/peft_helper.py, the names
of weights in vllm/lora/lora_model.py and vllm/lora/utils.py, the ranks in vllm/config/lora.py, and
the layers of vllm/model_executor/models/qwen3.py.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.base.checkpoint import read_header
from pipeline.engine.vllm_launch import MAX_RANKS, adapter_rank, max_rank
from pipeline.run import read_json

_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Kinds of adapters vLLM does not compute, by their key in adapter_config.json.
_UNKNOWN = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "lora_bias": "a bias",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
# Beginnings that leave the base as it is; of the others PEFT changes it when it loads them.
_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


def why_not_vllm(adapter: Path) -> str:
    """Why vLLM does not load an adapter in PEFT's layout, in a few words; empty if it does."""
    config = read_json(adapter / "adapter_config.json")
    return "; ".join([*_faults(config), *_foreign_weights(adapter)])


def vllm_options(adapter: Path) -> str:
    """The options of `vllm serve` for an adapter that it loads."""
    rank = adapter_rank(read_json(adapter / "adapter_config.json"))
    return f"--enable-lora --max-lora-rank {max_rank([rank])}"


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    for key, kind in _UNKNOWN.items():
        if config.get(key):
            yield f"it does not know {kind}"
    if config.get("bias", "none") != "none":
        yield "it does not know a bias"
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower() not in _BEGINNINGS:
        yield f"{begun} changes the base itself"
    if adapter_rank(config) > MAX_RANKS[-1]:
        yield f"rank {adapter_rank(config)} is above its {MAX_RANKS[-1]}"


def _foreign_weights(adapter: Path) -> list[str]:
    """The first weight that is no factor of a layer it puts adapters on, if there is one."""
    for tensor in read_header(adapter / "adapter_model.safetensors"):
        layer, _, factor = tensor.name.rpartition(".lora_")
        if factor not in ("A.weight", "B.weight") or layer.rpartition(".")[2] not in _LAYERS:
            return [f"it has no place for {tensor.name}"]
    return []
