"""The merged weights themselves: W + s·BA in float64 once more, apart from `merge`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pipeline.base.checkpoint import Tensor, read_layout, read_tensor
from pipeline.base.nf4 import as_trained, quantised_weights
from pipeline.errors import RunError


def check_weights(base: Path, adapter: Path, method: str, merged: Path) -> dict[str, Any]:
    """Hold every stored value to the exact one: correctly rounded, but for one float32 ulp.

    Returns the number of weights that were adapted, of values checked and of values that are wrong.
    """
    deltas = dict(_deltas(adapter))
    quantised = quantised_weights(base) if method == "qlora" else frozenset()
    originals, stored = _tensors(base), _tensors(merged)
    if {n: t.shape for n, t in originals.items()} != {n: t.shape for n, t in stored.items()}:
        raise RunError(f"{merged} does not hold the same tensors as {base}; merge again")
    num_values = num_wrong = 0
    for name, tensor in originals.items():
        original = read_tensor(tensor)
        exact = (as_trained(original) if name in quantised else original).double()
        if name in deltas:
            exact += deltas[name]()
        found = read_tensor(stored[name])
        num_values += found.numel()
        num_wrong += int((~_is_rounded(exact, found)).sum())
    return {"adapted": len(deltas), "values": num_values, "wrong_values": num_wrong}


def put_exact_weights(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Add an adapter's product to a float32 model's weights, summed in float64."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in _deltas(adapter):
            weights[name].copy_(weights[name].double() + delta())
    return model


def _deltas(adapter: Path) -> Iterator[tuple[str, Any]]:
    """Weight names and, for each, a function that computes s·BA in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    factors = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    for name, a in factors.items():
        if name.endswith("lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b = factors[f"{module}.lora_B.weight"]
            weight = module.removeprefix("base_model.model.") + ".weight"
            yield weight, lambda a=a, b=b: scale * (b.double() @ a.double())


def _is_rounded(exact: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    single = exact.float()
    neighbours = [
        single,
        torch.nextafter(single, torch.full_like(single, torch.inf)),
        torch.nextafter(single, torch.full_like(single, -torch.inf)),
    ]
    return torch.stack([n.to(found.dtype) == found for n in neighbours]).any(dim=0)


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {tensor.name: tensor for shard in read_layout(folder).values() for tensor in shard}
