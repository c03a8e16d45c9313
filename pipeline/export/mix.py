"""llama.cpp's mixes: the type each tensor of a K-quantised file is stored in.

The rules of its src/llama-quant.cpp (`llama_tensor_get_type_impl`, `tensor_type_fallback`) as they
are without an importance matrix, but for what it does to Falcon, to models of eight experts and to
Llama's 70B.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

_BLOCK = re.compile(r"blk\.(\d+)\.(.*)")
# What a type becomes for rows that are no whole number of its blocks of 256.
_FALLBACKS = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}


@dataclass(frozen=True)
class Mix:
    """What a format stores most tensors in, and how a file says that it has that format."""

    type: GGMLQuantizationType
    file_type: LlamaFileType


MIXES: Mapping[str, Mix] = {
    "q6_k": Mix(GGMLQuantizationType.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": Mix(GGMLQuantizationType.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k_m": Mix(GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
}


@dataclass(frozen=True)
class Model:
    """What the rules ask of a model."""

    num_layers: int
    is_tied: bool
    """Whether the token embeddings are the output layer, too."""


def choose_type(
    name: str, shape: tuple[int, ...], mix: Mix, model: Model
) -> GGMLQuantizationType | None:
    """The type of one tensor, by its GGUF name and its shape (…, row length); None to keep it."""
    if len(shape) < 2 or not name.endswith("weight") or "_norm.weight" in name:
        return None
    if "ffn_gate_inp.weight" in name:  # which expert is asked: small, and it decides
        return None
    wanted = mix.type
    if name == ("token_embd.weight" if model.is_tied else "output.weight") or (
        _is_sensitive(name) and _gets_more_bits(_layer(name), model.num_layers)
    ):
        wanted = GGMLQuantizationType.Q6_K
    return _that_fits(wanted, shape[-1])


def _is_sensitive(name: str) -> bool:
    match = _BLOCK.match(name)
    return match is not None and match[2].startswith(("attn_v.weight", "ffn_down"))


def _layer(name: str) -> int:
    match = _BLOCK.match(name)
    return int(match[1]) if match else -1


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _that_fits(wanted: GGMLQuantizationType, row_values: int) -> GGMLQuantizationType:
    for candidate in (wanted, _FALLBACKS[wanted]):
        if row_values % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return GGMLQuantizationType.F16
