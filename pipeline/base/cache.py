"""Fetched files, kept between runs: a folder is whole or not there, whoever else fetches it too."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def keep(name: str, make: Callable[[Path], Path]) -> Path:
    """The folder `name` of the cache; on first use `make` makes it in a work folder it is given.

    What `make` returns gets its final name by one rename; if it raises, nothing is left.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "pipeline" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        made = make(Path(work))
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same bytes
                raise
    return folder
