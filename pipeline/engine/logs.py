"""Where the engines of ours write what they say."""

import os
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

_NUM_KEPT = 20


@dataclass(frozen=True)
class Logs:
    """A log file for each start of an engine.

    In a run's folder the newest are kept; elsewhere one is kept only if something has failed.
    """

    name: str
    """Which engine, such as llamacpp."""
    folder: Path | None
    """None puts them among the temporary files, and so does a folder that cannot be written."""

    def begin(self) -> Path:
        """An empty file for the next start."""
        if self.folder is None or not _is_writable(self.folder):
            handle, name = tempfile.mkstemp(prefix=f"{self.name}-", suffix=".log")
        else:
            for old in sorted(self.folder.glob("engine-*.log"))[: 1 - _NUM_KEPT]:
                old.unlink(missing_ok=True)
            prefix = f"engine-{datetime.now():%Y%m%d-%H%M%S}-{self.name}-"
            handle, name = tempfile.mkstemp(prefix=prefix, suffix=".log", dir=self.folder)
        os.close(handle)
        return Path(name)

    def end(self, log: Path, *, has_failed: bool) -> None:
        """That start is over."""
        is_empty = log.is_file() and log.stat().st_size == 0
        if is_empty or (log.parent != self.folder and not has_failed):
            log.unlink(missing_ok=True)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
