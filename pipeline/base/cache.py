"""Fetched files, kept between runs: a folder is whole or not there, whoever else fetches it too."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def keep(name: str, make: Callable[[Path], Path]) -> Path:
    """The folder `name` of the cache; on first use `make` makes it in a work folder it is given.

    What `make` returns gets its final name by one rename; if it raises, nothing is left.
    """
    folder = kept(name)
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


def keep_once(name: str, make: Callable[[Path], Path]) -> Path:
    """The same for what takes long: of several processes one makes it, and the others wait."""
    folder = kept(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            for left in folder.parent.glob(f".{name}.work-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}.work-", dir=folder.parent) as work:
                make(Path(work)).rename(folder)
    return folder


def kept(name: str) -> Path:
    """Where the folder `name` of the cache is, or would be."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pipeline" / name


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block; the lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
