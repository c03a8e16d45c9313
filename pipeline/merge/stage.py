"""The merge stage: the base's own layout, tensor by tensor, with what was learnt in it."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch

from pipeline.base.beside import copy_beside
from pipeline.base.checkpoint import (
    DTYPES,
    Tensor,
    copy_blocks,
    read_layout,
    read_rows,
    read_tensor,
    tensor_bytes,
    write_shard,
)
from pipeline.base.nf4 import as_trained, quantised_weights
from pipeline.errors import RunError
from pipeline.merge.adapter import Lora, read_adapter
from pipeline.run import whole_folder

log = logging.getLogger(__name__)

Dtype = Literal["bfloat16", "float32"]
Method = Literal["lora", "qlora", "full"]
_STORED: dict[Dtype, str] = {"bfloat16": "BF16", "float32": "F32"}
_BLOCK_VALUES = 8 << 20  # 64 MiB of float64


@dataclass(frozen=True)
class _Plan:
    """What becomes of a base: its shards, what was learnt for them, and how that is stored."""

    layout: dict[str, list[Tensor]]
    adapted: Mapping[str, Lora]
    quantised: frozenset[str]
    trained: Mapping[str, Tensor]
    """Where all weights were trained: each of them, in float32."""
    dtype: Dtype

    def changes(self, tensor: Tensor) -> bool:
        """Whether a tensor is computed, rather than copied."""
        return any(tensor.name in names for names in (self.adapted, self.quantised, self.trained))

    def stored(self, tensor: Tensor) -> str:
        """The dtype a tensor is written in."""
        return _STORED[self.dtype] if self.changes(tensor) else tensor.dtype


def merge(
    base: Path, learnt: Path, out: Path, method: Method = "lora", dtype: Dtype = "bfloat16"
) -> None:
    """Write the merged checkpoint in the base's own layout.

    `learnt` is the adapter, or for `full` the checkpoint of all weights. For qlora the target is
    the base as trained: its weights quantised to NF4 and back. Sums are taken in float64 and
    rounded once to float32, then to `dtype`. Raises RunError for an adapter that does not fit, and
    for a disk that is too small or fails; nothing is left under `out` then.
    """
    try:
        plan = _plan(base, learnt, method, dtype)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise RunError(f"{base} cannot be read: {error.strerror}{where}") from error
    with whole_folder(out) as temporary:
        _check_space(plan, out)
        _write_shards(plan, temporary)
        copy_beside(base, temporary)


def _plan(base: Path, learnt: Path, method: Method, dtype: Dtype) -> _Plan:
    layout = read_layout(base)
    tensors = _by_name(layout)
    if method == "full":
        trained = _by_name(read_layout(learnt))
        if {n: t.shape for n, t in trained.items()} != {n: t.shape for n, t in tensors.items()}:
            raise RunError(f"{learnt} was not made from {base}: its tensors are others")
        return _Plan(layout, {}, frozenset(), trained, dtype)
    adapted = read_adapter(learnt)
    _check_fit(adapted, tensors, learnt, base)
    quantised = quantised_weights(base) if method == "qlora" else frozenset()
    return _Plan(layout, adapted, quantised, {}, dtype)


def _by_name(layout: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {tensor.name: tensor for shard in layout.values() for tensor in shard}


def _check_fit(
    adapted: Mapping[str, Lora], tensors: Mapping[str, Tensor], adapter: Path, base: Path
) -> None:
    for name, lora in adapted.items():
        tensor, shape = tensors.get(name), (lora.b.shape[0], lora.a.shape[1])
        if tensor is None or tensor.shape != shape:
            found = "is missing" if tensor is None else f"is {tensor.shape}"
            raise RunError(
                f"{adapter} was not made for {base}: {name} {found} there, the adapter is for "
                f"{shape}"
            )
        if lora.magnitude is not None and lora.magnitude.shape != shape[:1]:
            raise RunError(
                f"{adapter} was not made for {base}: {name} has {shape[0]} rows, the adapter "
                f"lengths for {tuple(lora.magnitude.shape)}"
            )


def _check_space(plan: _Plan, out: Path) -> None:
    tensors = _by_name(plan.layout).values()
    needed = sum(prod(tensor.shape) * DTYPES[plan.stored(tensor)].itemsize for tensor in tensors)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise RunError(
            f"{out} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free"
        )


def _write_shards(plan: _Plan, out: Path) -> None:
    for number, (name, shard) in enumerate(plan.layout.items(), start=1):
        changed = sum(map(plan.changes, shard))
        log.info("shard %d of %d: %d weights to merge", number, len(plan.layout), changed)
        shapes = {tensor.name: (plan.stored(tensor), tensor.shape) for tensor in shard}
        write_shard(out / name, shapes, (block for t in shard for block in _blocks(plan, t)))


def _blocks(plan: _Plan, tensor: Tensor) -> Iterator[bytearray | memoryview]:
    return _merged_blocks(plan, tensor) if plan.changes(tensor) else copy_blocks(tensor)


def _merged_blocks(plan: _Plan, tensor: Tensor) -> Iterator[memoryview]:
    lora = plan.adapted.get(tensor.name)
    source = plan.trained.get(tensor.name, tensor)
    # NF4's double quantisation needs the whole tensor; without it rows come one block at a time.
    whole = as_trained(read_tensor(source)) if tensor.name in plan.quantised else None
    rows = max(1, _BLOCK_VALUES // prod(tensor.shape[1:]))
    for first in range(0, tensor.shape[0], rows):
        last = min(first + rows, tensor.shape[0])
        block = (read_rows(source, first, last) if whole is None else whole[first:last]).double()
        if lora is not None:
            block = lora.apply(block, first)
        if not torch.isfinite(block).all():
            where = f"{source.shard}: {tensor.name}"
            raise RunError(f"{where} becomes values that are not finite; train again")
        yield tensor_bytes(block.float().to(DTYPES[_STORED[plan.dtype]]))
