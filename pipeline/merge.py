"""Base plus adapter to one checkpoint, streamed: W + s·BA, and nothing else changed."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.base.checkpoint import (
    DTYPES,
    INDEX,
    Tensor,
    copy_blocks,
    read_header,
    read_layout,
    read_rows,
    read_tensor,
    tensor_bytes,
    write_shard,
)
from pipeline.base.nf4 import as_trained, quantised_weights
from pipeline.errors import BaseError, RunError
from pipeline.run import whole_folder

log = logging.getLogger(__name__)

Dtype = Literal["bfloat16", "float32"]
_STORED: dict[Dtype, str] = {"bfloat16": "BF16", "float32": "F32"}
_BLOCK_VALUES = 8 << 20  # 64 MiB of float64
_PREFIX = "base_model.model."
# What comes along unchanged; .model is a tokenizer's.
_COPIED_ENDINGS = (".json", ".jinja", ".txt", ".md", ".model")
_PAPERS = ("LICENSE", "README", "NOTICE")
# What else PEFT can put into an adapter; each would need arithmetic that is not here.
_UNSUPPORTED = (
    "use_dora",
    "use_rslora",
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
    """The factors of one adapted weight: W' = W + scale · B A."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class _Plan:
    """What becomes of a base: its shards, the factors for them, and how sums are stored."""

    layout: dict[str, list[Tensor]]
    factors: dict[str, Lora]
    quantised: frozenset[str]
    dtype: Dtype

    def changes(self, tensor: Tensor) -> bool:
        """Whether a tensor is merged into, rather than copied."""
        return tensor.name in self.factors or tensor.name in self.quantised


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    method: Literal["lora", "qlora"] = "lora",
    dtype: Dtype = "bfloat16",
) -> None:
    """Write the merged checkpoint in the base's own layout.

    For qlora the target is the base as trained: its weights quantised to NF4 and back. Sums are
    taken in float64 and rounded once to float32, then to `dtype`. Raises RunError for an adapter
    that does not fit, and for a disk that is too small or fails; nothing is left under `out` then.
    """
    try:
        plan = _plan(base, adapter, method, dtype)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise RunError(f"{base} cannot be read: {error.strerror}{where}") from error
    with whole_folder(out) as temporary:
        _check_space(plan, out)
        _write_shards(plan, temporary)
        _copy_other_files(base, temporary)


def _plan(base: Path, adapter: Path, method: str, dtype: Dtype) -> _Plan:
    layout, factors = read_layout(base), read_adapter(adapter)
    tensors = {tensor.name: tensor for shard in layout.values() for tensor in shard}
    _check_fit(factors, tensors, adapter, base)
    quantised = quantised_weights(base) if method == "qlora" else frozenset()
    return _Plan(layout, factors, quantised, dtype)


def _write_shards(plan: _Plan, out: Path) -> None:
    for number, (name, shard) in enumerate(plan.layout.items(), start=1):
        changed = sum(map(plan.changes, shard))
        log.info("shard %d of %d: %d weights to merge", number, len(plan.layout), changed)
        shapes = {tensor.name: (_stored(plan, tensor), tensor.shape) for tensor in shard}
        write_shard(out / name, shapes, (block for t in shard for block in _blocks(plan, t)))


def _stored(plan: _Plan, tensor: Tensor) -> str:
    return _STORED[plan.dtype] if plan.changes(tensor) else tensor.dtype


def _blocks(plan: _Plan, tensor: Tensor) -> Iterator[bytearray | memoryview]:
    return _merged_blocks(plan, tensor) if plan.changes(tensor) else copy_blocks(tensor)


def read_adapter(adapter: Path) -> dict[str, Lora]:
    """The factors of a PEFT LoRA adapter by the name of the weight they change.

    Raises RunError for a kind of adapter that cannot be merged here, and for values that are not
    finite.
    """
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        scale = config["lora_alpha"] / config["r"]
    except FileNotFoundError as error:
        raise RunError(f"{adapter} is not an adapter: adapter_config.json is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{adapter / 'adapter_config.json'} is not a LoRA adapter's") from error
    kinds = [name for name in _UNSUPPORTED if config.get(name)]
    begun = str(config.get("init_lora_weights"))
    kinds += [begun] if begun.startswith(_BASE_CHANGED_BY) else []
    if config.get("peft_type") != "LORA" or kinds:
        raise RunError(f"{adapter} is not a plain LoRA adapter: {', '.join(kinds) or 'other type'}")
    weights = _read_adapter_weights(adapter)
    modules = [name.removesuffix(".lora_A.weight") for name in weights if ".lora_A." in name]
    if 2 * len(modules) != len(weights):
        raise RunError(f"{adapter} holds weights that are no LoRA factors")
    return {
        module.removeprefix(_PREFIX) + ".weight": Lora(
            weights[f"{module}.lora_A.weight"], weights[f"{module}.lora_B.weight"], scale
        )
        for module in modules
    }


def _read_adapter_weights(adapter: Path) -> dict[str, torch.Tensor]:
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise RunError(f"{adapter} has no {file.name}; only safetensors adapters are read")
    weights = {tensor.name: read_tensor(tensor) for tensor in read_header(file)}
    for name, values in weights.items():
        if not torch.isfinite(values).all():
            raise RunError(f"{adapter}: {name} holds values that are not finite; train again")
    return weights


def _check_fit(
    factors: dict[str, Lora], tensors: dict[str, Tensor], adapter: Path, base: Path
) -> None:
    for name, lora in factors.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != (lora.b.shape[0], lora.a.shape[1]):
            found = "is missing" if tensor is None else f"is {tensor.shape}"
            raise RunError(
                f"{adapter} was not made for {base}: {name} {found} there, the adapter is for "
                f"{(lora.b.shape[0], lora.a.shape[1])}"
            )


def _check_space(plan: _Plan, out: Path) -> None:
    base_bytes = sum(tensor.num_bytes for shard in plan.layout.values() for tensor in shard)
    needed = base_bytes * (2 if plan.dtype == "float32" else 1)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise RunError(
            f"{out} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free"
        )


def _merged_blocks(plan: _Plan, tensor: Tensor) -> Iterator[memoryview]:
    lora = plan.factors.get(tensor.name)
    # NF4's double quantisation needs the whole tensor; without it rows come one block at a time.
    whole = as_trained(read_tensor(tensor)) if tensor.name in plan.quantised else None
    rows = max(1, _BLOCK_VALUES // tensor.shape[1])
    for first in range(0, tensor.shape[0], rows):
        last = min(first + rows, tensor.shape[0])
        block = (read_rows(tensor, first, last) if whole is None else whole[first:last]).double()
        if lora is not None:
            block += lora.scale * (lora.b[first:last].double() @ lora.a.double())
        yield tensor_bytes(block.float().to(DTYPES[_STORED[plan.dtype]]))


def _copy_other_files(base: Path, out: Path) -> None:
    for path in base.iterdir():
        if path.is_file() and _belongs_to_a_checkpoint(path.name):
            shutil.copyfile(path, out / path.name)
    _write_config(base, out)


def _belongs_to_a_checkpoint(name: str) -> bool:
    """Tokenizer, template, configuration and papers: never weights, which would be unmerged.

    Nor an index of other weights; and base.json speaks of the base's own bytes.
    """
    if name.endswith(".index.json"):
        return name == INDEX
    return name != "base.json" and (name.endswith(_COPIED_ENDINGS) or name.startswith(_PAPERS))


def _write_config(base: Path, out: Path) -> None:
    try:
        config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseError(f"{base / 'config.json'} is not JSON; fetch the base again") from error
    # transformers 4 reads rope_theta, transformers 5 rope_parameters; an engine that finds only the
    # other one falls back to a theta of 10,000 without a word.
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    elif "rope_theta" in config:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
