"""An adapter in PEFT's layout to llama.cpp's: a GGUF file of factors, for the base's own GGUF.

The layout is that of llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

import json
import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys, get_tensor_name_map
from safetensors.numpy import load_file

from pipeline.errors import RunError
from pipeline.run import read_json

Array = np.ndarray[Any, Any]
# By config.json's model_type.
_ARCHITECTURES = {"qwen3": MODEL_ARCH.QWEN3, "llama": MODEL_ARCH.LLAMA}
_PREFIX = "base_model.model."


def write_lora(adapter: Path, base: Path, out: Path) -> None:
    """Write a plain LoRA adapter as GGUF, in float32; `base` is the checkpoint it was trained on.

    Raises RunError for an adapter with more than LoRA's two factors, and for a base whose layout
    in GGUF is not known here.
    """
    config = read_json(base / "config.json")
    architecture = _ARCHITECTURES.get(config.get("model_type"))
    if architecture is None:
        raise RunError(f"{adapter}: no GGUF adapter for {config.get('model_type')} models")
    names = get_tensor_name_map(architecture, config["num_hidden_layers"])
    with closing(GGUFWriter(out, MODEL_ARCH_NAMES[architecture])) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, _alpha(adapter))
        for name, factor in load_file(adapter / "adapter_model.safetensors").items():
            module, kind = _split(name, adapter)
            gguf_name = names.get_name(module)
            if gguf_name is None:
                raise RunError(f"{adapter}: {module} is unknown to llama.cpp")
            if kind == "b":
                factor = _reordered(module, factor, config)
            writer.add_tensor(f"{gguf_name}.weight.lora_{kind}", factor.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _alpha(adapter: Path) -> float:
    """llama.cpp scales by alpha / rank, and rsLoRA by alpha / √rank (Kalajdzievski 2023)."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    alpha = float(config["lora_alpha"])
    return alpha * math.sqrt(config["r"]) if config.get("use_rslora") else alpha


def _split(name: str, adapter: Path) -> tuple[str, str]:
    """The module a factor belongs to, and which of the two it is."""
    for kind in ("a", "b"):
        ending = f".lora_{kind.upper()}.weight"
        if name.startswith(_PREFIX) and name.endswith(ending):
            return name.removeprefix(_PREFIX).removesuffix(ending), kind
    raise RunError(
        f"{adapter} cannot be written as GGUF: {name} is no factor of a plain LoRA adapter"
    )


def _reordered(module: str, b: Array, config: Mapping[str, Any]) -> Array:
    """B (out, rank) with its rows in the order llama.cpp's Llama has those of W.

    It rotates pairs of neighbours where transformers rotates halves of a head, so the converter
    has changed the order within each head of q and k (conversion/llama.py, `permute`).
    """
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = heads.get(module.rpartition(".")[2])
    if config["model_type"] != "llama" or key is None:
        return b
    num_heads = config[key]
    halves = b.reshape(num_heads, 2, len(b) // num_heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(b.shape))
