"""The replies under way, as far as they have come: read only after a process was killed."""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.serve.books.spool import Row, lines

log = logging.getLogger(__name__)

EVERY_S = 1.0
"""How far the journal may be behind."""
GATHER_S = 0.02
"""How far behind the beginnings of replies: each would take a moment from its own first token."""
SoFar = Callable[[], Row]
"""The row of a reply, as things stand."""


class Journal:
    """A file that a thread of its own writes: a line when a reply begins, and all once a second.

    The system keeps what a killed process has written, so nothing is fsynced; and replies that have
    ended may still be in it, as their rows are in the books by then.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._open: dict[str, SoFar] = {}
        self._begun: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._keeper = threading.Thread(target=self._keep, name="journal", daemon=True)
        self._keeper.start()

    def follow(self, reply_id: str, so_far: SoFar) -> None:
        """A reply begins; another of its id, which came to nothing, is forgotten."""
        self._open[reply_id] = so_far
        self._begun.put(reply_id)

    def unfollow(self, reply_id: str) -> None:
        """It has its row, or is to have none."""
        self._open.pop(reply_id, None)

    def close(self) -> None:
        """Nothing is under way any more."""
        self._begun.put(None)
        self._keeper.join()
        self._file.unlink(missing_ok=True)

    def _keep(self) -> None:
        whole_s = time.monotonic()
        while True:
            begun = self._gather()
            if None in begun:
                return
            if still_open := [so_far for reply in begun if (so_far := self._open.get(reply or ""))]:
                self._write(self._file, "ab", still_open)
            if time.monotonic() - whole_s >= EVERY_S:
                new = Path(f"{self._file}.new")
                if self._write(new, "wb", list(self._open.values())):
                    new.replace(self._file)
                whole_s = time.monotonic()

    def _gather(self) -> list[str | None]:
        """The replies that have begun, once one has; none, where that takes long."""
        try:
            gathered = [self._begun.get(timeout=EVERY_S if self._open else None)]
        except queue.Empty:
            return []
        if gathered[0] is not None:
            time.sleep(GATHER_S)
        while not self._begun.empty():
            gathered.append(self._begun.get())
        return gathered

    def _write(self, file: Path, mode: str, replies: Sequence[SoFar]) -> bool:
        """Whether it could be done; replies go on without."""
        try:
            with open(file, mode, opener=_private) as opened:
                opened.write(lines(so_far() for so_far in replies))
        except OSError as error:
            log.warning("replies under way are not journalled: %s", error)
            return False
        return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
