"""Rows that the books could not take: kept in a file, fsynced, until they can."""

import fcntl
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

Row = Mapping[str, Any]
"""A generation by the names of its columns."""
RESERVED_BYTES = 2**20
"""Of the file from its beginning, so that a full disk has room for a thousand rows."""


class Spool:
    """A file of this process alone; what follows its last line is zeros."""

    def __init__(self, file: Path) -> None:
        """Locked until `close`, or until the process has ended, however that comes."""
        self.file = file
        self._rows: list[Row] = []
        self._end = 0
        self._changing = threading.Lock()
        self._oldest_s = 0.0
        self.is_safe = True
        """Whether what is in memory is in the file, too."""
        # It has its name only once it is locked: an unlocked one is anybody's to bring in.
        new = Path(f"{file}.new")
        self._descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._write(bytes(RESERVED_BYTES), 0)
        new.rename(file)

    @property
    def rows(self) -> Sequence[Row]:
        """What is kept, oldest first."""
        return tuple(self._rows)

    @property
    def num_rows(self) -> int:
        """How many those are."""
        return len(self._rows)

    @property
    def age_s(self) -> float:
        """Since when there has been something to keep."""
        return time.monotonic() - self._oldest_s if self._rows else 0.0

    def add(self, rows: Sequence[Row]) -> None:
        """Return once they are on the disk; OSError if they are not: then memory has them alone."""
        with self._changing:
            if not self._rows:
                self._oldest_s = time.monotonic()
            self._rows += rows
            # All of them if an earlier write failed.
            text = lines(rows if self.is_safe else self._rows)
            begin = self._end if self.is_safe else 0
            self._write(text, begin)
            self._end = begin + len(text)

    def drop(self, num_rows: int) -> None:
        """The oldest are in the books."""
        with self._changing:
            del self._rows[:num_rows]
            text = lines(self._rows)
            self._write(text.ljust(self._end, b"\0"), 0)
            self._end = len(text)

    def close(self) -> None:
        """What is left is for the next process."""
        if not self._rows:
            self.file.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _write(self, text: bytes, begin: int) -> None:
        written = 0
        try:
            while written < len(text):
                written += os.pwrite(self._descriptor, text[written:], begin + written)
            os.fsync(self._descriptor)
        except OSError:
            self.is_safe = False
            raise
        self.is_safe = True


def read_rows(file: Path) -> list[Row]:
    """Of a spool or a journal; a line that was cut off was promised to nobody."""
    text, before = b"", None
    try:
        with file.open("rb") as opened:
            if opened.read(1) in (b"", b"\0"):
                return []
        while text != before:  # its process may be writing into it
            text, before = file.read_bytes(), text
    except FileNotFoundError:
        return []
    return [orjson.loads(line) for line in text.partition(b"\0")[0].split(b"\n")[:-1]]


def lines(rows: Iterable[Row]) -> bytes:
    """As both kinds of file have them."""
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)
