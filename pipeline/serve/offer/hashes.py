"""The sha256 of weights: written down when it is first needed, and told without reading them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.base.cache import kept
from pipeline.run import Run, hash_contents, hash_files, hash_value, read_json, write_json


def hash_once(folder: Path, files: Iterable[Path]) -> str:
    """One sha256 over files; one that has not changed since is not read again: they are large."""
    known = _noted(folder)
    found = hash_files(sorted(files), folder, known)
    if found != known:
        write_json(_note(folder), {**known, **found})
    return hash_contents(found)


def known_hash(weights: Path) -> str | None:
    """Of a file, or over all weights in a folder; None where nobody has had to read them.

    The stages of a run have, and whoever made a GGUF file of a checkpoint.
    """
    if weights.is_file():
        return _known(weights)
    found = {file.name: _known(file) for file in sorted(weights.glob("*.safetensors"))}
    return hash_value(found) if found and all(found.values()) else None


def _known(file: Path) -> str | None:
    status, path = file.stat(), file.parent.resolve() / file.name
    for root, files in [(path.parent, _noted(path.parent)), *_of_runs(path)]:
        said = files.get(str(path.relative_to(root)), {})
        if (said.get("size"), said.get("mtime")) == (status.st_size, status.st_mtime_ns):
            return str(said["sha256"])
    return None


def _of_runs(path: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """What the stages of a run in whose folders a file lies have written of their files."""
    runs = [Run(folder) for folder in path.parents[1:3]]
    return [
        (run.folder, stage["files"])
        for run in runs
        if run.recipe.is_file()
        for stage in run.facts()["stages"].values()
    ]


def _noted(folder: Path) -> dict[str, Any]:
    note = _note(folder)
    return dict(read_json(note)) if note.is_file() else {}


def _note(folder: Path) -> Path:
    return kept("hashes") / f"{hash_value(str(folder.resolve()))[:16]}.json"
