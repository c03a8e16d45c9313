"""The merged weights themselves: what was learnt in float64 once more, apart from `merge`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pipeline.base.checkpoint import Tensor, read_layout, read_tensor
from pipeline.base.nf4 import as_trained, quantised_weights
from pipeline.errors import RunError

Change = Callable[[torch.Tensor], torch.Tensor]
"""A weight in float64 to what it is after training."""


def check_weights(base: Path, adapter: Path, method: str, merged: Path) -> dict[str, Any]:
    """Hold every stored value to the exact one: correctly rounded, but for one float32 ulp.

    Returns the number of weights that were adapted, of values checked and of values that are wrong.
    """
    changes = dict(_changes(adapter))
    quantised = quantised_weights(base) if method == "qlora" else frozenset()

    def exact(tensor: Tensor) -> torch.Tensor:
        original = read_tensor(tensor)
        start = (as_trained(original) if tensor.name in quantised else original).double()
        return changes[tensor.name](start) if tensor.name in changes else start

    return {"adapted": len(changes)} | _compare(base, merged, exact, _is_rounded)


def check_all_weights(trained: Path, merged: Path) -> dict[str, Any]:
    """The same where all weights were trained: each stored value is the trained one, rounded."""

    def is_cast(exact: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        return exact.to(found.dtype) == found

    return _compare(trained, merged, read_tensor, is_cast)


def put_exact_weights(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """Put what an adapter makes of a float32 model's weights, computed in float64, in place."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in _changes(adapter):
            weights[name].copy_(change(weights[name].double()))
    return model


def _compare(
    reference: Path,
    merged: Path,
    exact: Callable[[Tensor], torch.Tensor],
    is_right: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> dict[str, int]:
    originals, stored = _tensors(reference), _tensors(merged)
    if {n: t.shape for n, t in originals.items()} != {n: t.shape for n, t in stored.items()}:
        raise RunError(f"{merged} does not hold the same tensors as {reference}; merge again")
    num_values = num_wrong = 0
    for name, tensor in originals.items():
        found = read_tensor(stored[name])
        num_values += found.numel()
        num_wrong += int((~is_right(exact(tensor), found)).sum())
    return {"values": num_values, "wrong_values": num_wrong}


def _changes(adapter: Path) -> Iterator[tuple[str, Change]]:
    """Weight names and, for each, what the adapter makes of that weight."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    factors = load_file(adapter / "adapter_model.safetensors")
    # rsLoRA divides by the root of the rank (Kalajdzievski 2023, theorem 3.2), LoRA by the rank.
    scale = config["lora_alpha"] * config["r"] ** (-0.5 if config.get("use_rslora") else -1.0)
    for name, a in factors.items():
        if name.endswith("lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b = factors[f"{module}.lora_B.weight"]
            magnitude = factors.get(f"{module}.lora_magnitude_vector")
            weight = module.removeprefix("base_model.model.") + ".weight"
            yield weight, _change(a.double(), scale * b.double(), magnitude)


def _change(a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor | None) -> Change:
    def change(weight: torch.Tensor) -> torch.Tensor:
        total = torch.addmm(weight, b, a)
        if magnitude is None:
            return total
        # DoRA: a direction of length one for each output, and its learnt length.
        return torch.nn.functional.normalize(total, dim=1, eps=0.0).T.mul(magnitude.double()).T

    return change


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
