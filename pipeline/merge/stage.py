"""The merge stage: the base's own layout, tensor by tensor, with what was learnt in it."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.base.checkpoint import Tensor, read_layout
from pipeline.base.nf4 import Record, quantised_weights, read_record
from pipeline.base.yarn import read_config
from pipeline.errors import RunError
from pipeline.merge import combine as mixing
from pipeline.merge.adapter import read_adapter
from pipeline.merge.change import Change
from pipeline.merge.tied import tie
from pipeline.merge.weights import Weights
from pipeline.merge.write import write_checkpoint
from pipeline.recipe import Merge
from pipeline.run import hash_value

log = logging.getLogger(__name__)

Method = Literal["lora", "qlora", "full"]


@dataclass(frozen=True)
class Mixture:
    """Several adapters to be added together."""

    adapters: tuple[Path, ...]
    weights: tuple[float, ...]
    """One for each."""
    method: mixing.Method = "linear"
    density: float = 1.0
    """Of ties and dare: which share of each adapter's change is kept."""


def merge(
    base: Path,
    learnt: Path | Mixture,
    out: Path,
    method: Method = "lora",
    settings: Merge | None = None,
    seed: int = 0,
) -> None:
    """Write the merged checkpoint in the base's own layout.

    `learnt` is the adapter, or several, or for `full` the checkpoint of all weights. For qlora the
    target is the base as trained: its weights quantised to NF4 and back. `seed` is for stochastic
    rounding and for dare. Raises RunError for an adapter that does not fit, and for a disk that is
    too small or fails; nothing is left under `out` then. After Interrupted, or a process that was
    killed, the same merge goes on with the shards that are whole.
    """
    settings = settings or Merge()
    folders = learnt.adapters if isinstance(learnt, Mixture) else (learnt,)
    try:
        weights = _plan(base, learnt, method, settings, seed)
        made_from = _identity(weights, folders, [repr(learnt), method])
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise RunError(f"{base} cannot be read: {error.strerror}{where}") from error
    is_elsewhere = method == "qlora" and settings.onto == "original"
    held = quantised_weights(base) if is_elsewhere else ()
    write_checkpoint(weights, base, out, made_from, held)


def _plan(
    base: Path, learnt: Path | Mixture, method: Method, settings: Merge, seed: int
) -> Weights:
    layout = read_layout(base)
    read_config(base)  # refused before the hours of writing
    if method == "full":
        if isinstance(learnt, Mixture):
            raise RunError("only adapters are mixed, not checkpoints of all weights")
        trained = _by_name(read_layout(learnt))
        if _shapes(trained) != _shapes(_by_name(layout)):
            raise RunError(f"{learnt} was not made from {base}: its tensors are others")
        return Weights(layout, {}, {}, trained, settings, seed)
    folders = learnt.adapters if isinstance(learnt, Mixture) else (learnt,)
    tensors = _by_name(layout)
    adapters = [tie(read_adapter(folder), tensors, folder, base) for folder in folders]
    for folder, adapter in zip(folders, adapters, strict=True):
        _check_fit(adapter, tensors, folder, base)
    adapted = adapters[0]
    if isinstance(learnt, Mixture):
        adapted = mixing.combine(adapters, learnt.weights, learnt.method, learnt.density, seed)
    quantised: Mapping[str, Record | None] = {}
    if method == "qlora" and settings.onto == "trained":
        quantised = _quantised(base, folders)
    return Weights(layout, adapted, quantised, {}, settings, seed)


def _quantised(base: Path, adapters: Iterable[Path]) -> dict[str, Record | None]:
    """Which weights adapters were trained over in 4 bit, and what they were then."""
    quantised: dict[str, Record | None] = dict.fromkeys(quantised_weights(base))
    for adapter in adapters:
        records = read_record(adapter)
        if not records:
            log.info("%s does not say what its base was in 4 bit; that is not checked", adapter)
        for name, record in records.items():
            before = quantised.get(name)
            if name not in quantised or (before and before.sha256 != record.sha256):
                raise RunError(f"{adapter} was trained over another base in 4 bit than {base}")
            quantised[name] = record
    return quantised


def _by_name(layout: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {tensor.name: tensor for shard in layout.values() for tensor in shard}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_fit(
    adapted: Mapping[str, Change], tensors: Mapping[str, Tensor], adapter: Path, base: Path
) -> None:
    for name, change in adapted.items():
        tensor = tensors.get(name)
        if tensor is None or not change.fits(tensor.shape):
            found = "is missing" if tensor is None else f"is {tensor.shape}"
            raise RunError(
                f"{adapter} was not made for {base}: {name} {found} there, the adapter is for "
                f"{change.shape}"
            )


def _identity(weights: Weights, folders: Iterable[Path], how: list[str]) -> str:
    """One sha256 over what every shard is made from, by the files' sizes and times."""
    shards = {tensor.shard for tensor in weights.tensors.values()}
    files = sorted(shards) + [p for f in folders for p in sorted(f.rglob("*")) if p.is_file()]
    found = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return hash_value([found, weights.settings.model_dump(), weights.seed, how])
