"""Shards on disk: written as a stream, and those an interrupted merge has left not again."""

import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.base.beside import copy_beside
from pipeline.base.checkpoint import INDEX, write_shard
from pipeline.errors import Interrupted, RunError
from pipeline.merge.original import measure_cost
from pipeline.merge.weights import Weights
from pipeline.run import resumed_folder

log = logging.getLogger(__name__)

_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def write_checkpoint(
    weights: Weights, base: Path, out: Path, made_from: str, held: Iterable[str] = ()
) -> None:
    """Write a checkpoint in the base's own layout, under its name once it is whole.

    `held` are weights that were in 4 bit in training and are not here: what that costs is told
    first. Raises Interrupted after Ctrl-C, and where somebody else has taken the name meanwhile:
    what is whole then, or when the process is killed, is not made again if `made_from` is the same
    the next time. RunError for a disk that is too small or fails.
    """
    was_there = os.path.lexists(out)
    with resumed_folder(out, made_from) as temporary:
        try:
            _remove_parts(temporary)
            _check_space(weights, temporary)
            if names := list(held):
                log.info("%s", measure_cost(weights, names))
            _write_shards(weights, temporary)
        except KeyboardInterrupt as stop:
            raise _interrupted(weights, temporary) from stop
        copy_beside(base, temporary, **_dtype(weights))
        _correct_index(weights, temporary)
        if os.path.lexists(out) and not was_there:
            raise Interrupted(
                f"{out} has appeared during the merge; rename it, and the same merge goes on from "
                f"{temporary}"
            )


def _interrupted(weights: Weights, folder: Path) -> Interrupted:
    _remove_parts(folder)
    return Interrupted(
        f"interrupted; {len(_whole(weights, folder))} of {len(weights.layout)} shards are in "
        f"{folder}, and the same merge goes on from there"
    )


def _remove_parts(folder: Path) -> None:
    for part in folder.glob("*.part"):
        part.unlink()


def _whole(weights: Weights, folder: Path) -> list[str]:
    return [name for name in weights.layout if (folder / name).is_file()]


def _write_shards(weights: Weights, folder: Path) -> None:
    whole = _whole(weights, folder)
    for number, (name, shard) in enumerate(weights.layout.items(), start=1):
        changed = sum(map(weights.changes, shard))
        if name in whole:
            log.info("shard %d of %d: already there", number, len(weights.layout))
            continue
        log.info("shard %d of %d: %d weights to merge", number, len(weights.layout), changed)
        shapes = {tensor.name: (weights.stored(tensor), tensor.shape) for tensor in shard}
        part = folder / f"{name}.part"
        write_shard(part, shapes, (block for t in shard for block in weights.blocks(t)))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(folder / name)


def _check_space(weights: Weights, folder: Path) -> None:
    missing = set(weights.layout) - set(_whole(weights, folder))
    needed = sum(weights.num_bytes(name) for name in missing)
    free = shutil.disk_usage(folder).free
    if free < needed:
        out = folder.with_suffix("")
        raise RunError(
            f"{out} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free"
        )


def _dtype(weights: Weights) -> dict[str, str]:
    """What the configuration says of the dtype: one that holds all tensors, in both spellings."""
    stored = {weights.stored(tensor) for tensor in weights.tensors.values()}
    name = _NAMES[stored.pop()] if len(stored) == 1 else "float32"
    return {"dtype": name, "torch_dtype": name}


def _correct_index(weights: Weights, folder: Path) -> None:
    """The base's index, copied, with the size of what was written."""
    path = folder / INDEX
    if not path.is_file():
        return
    index = json.loads(path.read_text(encoding="utf-8"))
    total = sum(map(weights.num_bytes, weights.layout))
    metadata = index.get("metadata") or {}
    if metadata.get("total_size") != total:
        index["metadata"] = {**metadata, "total_size": total}
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
