"""An adapter in PEFT's layout: what it makes of each weight, and which kinds are refused."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.base.checkpoint import read_header, read_tensor
from pipeline.errors import RunError

_PREFIX = "base_model.model."
# What else PEFT can put into an adapter; each would need arithmetic that is not here.
_UNSUPPORTED = (
    "modules_to_save",
    "trainable_token_indices",
    "rank_pattern",
    "alpha_pattern",
    "alora_invocation_tokens",
    "layer_replication",
    "lora_bias",
    "fan_in_fan_out",
)
# Ways to begin an adapter that change the base itself, so that W + s·BA is not the trained model.
_BASE_CHANGED_BY = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Lora:
    """What is learnt of one weight: W' = W + scale · B A, or DoRA's m · W' / ‖W'‖, row by row."""

    a: torch.Tensor
    """(rank, in)"""
    b: torch.Tensor
    """(out, rank)"""
    scale: float
    magnitude: torch.Tensor | None = None
    """(out), of DoRA alone: each row's length (Liu et al. 2024, equation 5; a row of W is what
    PEFT's dora.py takes the norm of)."""

    def apply(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Some rows of W, in float64, from row `first` on, as they are after training."""
        part = slice(first, first + len(rows))
        rows = rows + self.scale * (self.b[part].double() @ self.a.double())
        if self.magnitude is None:
            return rows
        lengths = rows.square().sum(dim=1).sqrt()
        return rows * (self.magnitude[part].double() / lengths)[:, None]


def read_adapter(adapter: Path) -> dict[str, Lora]:
    """What an adapter has learnt, by the name of the weight it changes.

    Raises RunError for a kind of adapter that cannot be merged here, and for values that are not
    finite.
    """
    config, scale = _read_config(adapter)
    weights = _read_weights(adapter)
    modules = [name.removesuffix(".lora_A.weight") for name in weights if ".lora_A." in name]
    kinds = ["lora_A.weight", "lora_B.weight"]
    kinds += ["lora_magnitude_vector"] if config.get("use_dora") else []
    if {f"{module}.{kind}" for module in modules for kind in kinds} != weights.keys():
        raise RunError(f"{adapter} holds weights that are no LoRA factors")
    return {
        module.removeprefix(_PREFIX) + ".weight": Lora(
            weights[f"{module}.lora_A.weight"],
            weights[f"{module}.lora_B.weight"],
            scale,
            weights.get(f"{module}.lora_magnitude_vector"),
        )
        for module in modules
    }


def _read_config(adapter: Path) -> tuple[Mapping[str, Any], float]:
    """An adapter's configuration, and what its product is multiplied by."""
    path = adapter / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        alpha, rank = config["lora_alpha"], config["r"]
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except FileNotFoundError as error:
        raise RunError(f"{adapter} is not an adapter: {path.name} is missing") from error
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise RunError(f"{path} is not a LoRA adapter's") from error
    kinds = [name for name in _UNSUPPORTED if config.get(name)]
    begun = str(config.get("init_lora_weights"))
    if begun.startswith(_BASE_CHANGED_BY):
        kinds.append(f"{begun}, which changes the base itself")
    if config.get("peft_type") != "LORA" or kinds:
        raise RunError(f"{adapter} is not a plain LoRA adapter: {', '.join(kinds) or 'other type'}")
    return config, scale


def _read_weights(adapter: Path) -> dict[str, torch.Tensor]:
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise RunError(f"{adapter} has no {file.name}; only safetensors adapters are read")
    weights = {tensor.name: read_tensor(tensor) for tensor in read_header(file)}
    for name, values in weights.items():
        if not torch.isfinite(values).all():
            raise RunError(f"{adapter}: {name} holds values that are not finite; train again")
    return weights
