"""Rows on their way into the books: what has gathered is one commit, or lines of the spool."""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from sqlalchemy import Engine, insert

from pipeline.errors import BooksError
from pipeline.serve.books import tables
from pipeline.serve.books.database import why
from pipeline.serve.books.pending import ROW_FAULTS, insert_missing
from pipeline.serve.books.spool import Row, Spool

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""How often books that could not be written are tried again."""
MAX_SPOOLED = 1000
MAX_SPOOLED_S = 60.0
"""With more rows in the spool, or older ones, a server calls itself not ready."""


@dataclass(frozen=True)
class State:
    """How far the books are behind."""

    num_waiting: int
    """Rows that are neither in the books nor in the spool."""
    num_spooled: int
    spooled_s: float
    """How long the oldest of them has been there."""
    commit_s: float
    """How long the last commit took."""
    committed_s: float
    """When it was, since the epoch; 0 if there was none yet."""
    is_safe: bool
    """Whether the spool could be written when it had to be."""

    @property
    def is_ready(self) -> bool:
        """Whether it can go on like this."""
        is_within = self.num_spooled <= MAX_SPOOLED and self.spooled_s <= MAX_SPOOLED_S
        return self.is_safe and is_within


@dataclass(frozen=True)
class _Entry:
    """A row on its way, and who waits for it."""

    row: Row
    written: "Future[None]"


class Writer:
    """Two threads: one commits, the other empties the spool as soon as the books allow it."""

    def __init__(self, books: Engine, spool: Spool) -> None:
        self.spool = spool
        self._books = books
        self._entries: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._num_writing = 0
        self._commit_s = self._committed_s = 0.0
        self._is_away, self._is_closing = threading.Event(), threading.Event()
        self._writing = threading.Thread(target=self._write_all, name="ledger", daemon=True)
        self._emptying = threading.Thread(target=self._empty, name="spool", daemon=True)
        self._writing.start()
        self._emptying.start()

    @property
    def state(self) -> State:
        """At this moment."""
        spool = self.spool
        return State(
            self._entries.qsize() + self._num_writing,
            *(spool.num_rows, spool.age_s, self._commit_s, self._committed_s, spool.is_safe),
        )

    def put(self, row: Row) -> "Future[None]":
        """Done once the row is on the disk; BooksError if it cannot be written."""
        entry = _Entry(row, Future())
        self._entries.put(entry)
        return entry.written

    def close(self) -> None:
        """Write what is on its way and stop."""
        self._entries.put(None)
        self._writing.join()
        self._is_closing.set()
        self._is_away.set()
        self._emptying.join()
        if self.spool.num_rows:
            log.warning("%d rows are for the next server to book", self.spool.num_rows)

    def _write_all(self) -> None:
        while True:
            gathered = [self._entries.get()]
            while not self._entries.empty():
                gathered.append(self._entries.get())
            entries = [entry for entry in gathered if entry]
            self._num_writing = len(entries)
            if entries:
                self._write(entries)
            self._num_writing = 0
            if None in gathered:
                return

    def _write(self, entries: Sequence[_Entry]) -> None:
        """Commit all together; where one row is not fit to be written, each by itself."""
        if self.spool.num_rows:  # the books are away, and waiting for them would hold replies up
            self._set_aside(entries)
            return
        try:
            self._commit([entry.row for entry in entries])
        except ROW_FAULTS as error:
            if len(entries) == 1:
                _tell(entries, error)
            else:
                for entry in entries:
                    self._write([entry])
        except Exception as error:  # noqa: BLE001 - whatever it is, the rows are kept
            log.error("the books cannot be written: %s; rows are kept in a file", why(error))
            self._set_aside(entries)
        else:
            _tell(entries)

    def _commit(self, rows: Sequence[Row]) -> None:
        begun_s = time.monotonic()
        with self._books.begin() as connection:
            connection.execute(insert(tables.generations), rows)
        self._commit_s, self._committed_s = time.monotonic() - begun_s, time.time()

    def _set_aside(self, entries: Sequence[_Entry]) -> None:
        try:
            self.spool.add([entry.row for entry in entries])
        except OSError as error:
            _tell(entries, error)
        else:
            _tell(entries)
        self._is_away.set()

    def _empty(self) -> None:
        while True:
            self._is_away.wait()
            self._is_closing.wait(RETRY_S)
            is_last = self._is_closing.is_set()
            self._is_away.clear()
            if self.spool.num_rows and not self._try_to_empty():
                self._is_away.set()
            if is_last:
                return

    def _try_to_empty(self) -> bool:
        rows = self.spool.rows
        try:
            insert_missing(self._books, rows)
        except Exception:  # noqa: BLE001 - it was told when the first row was kept
            return False
        try:
            self.spool.drop(len(rows))
        except OSError as error:  # they would be brought in once more, which does nothing
            log.warning("the spool keeps what is in the books: %s", error)
        log.info("the books have the %d rows that were kept in a file", len(rows))
        return not self.spool.num_rows


def _tell(entries: Sequence[_Entry], error: Exception | None = None) -> None:
    for entry in entries:
        if not entry.written.set_running_or_notify_cancel():
            continue  # nobody waits for it any more
        if error is None:
            entry.written.set_result(None)
        else:
            what = f"{entry.row['id']} was not written to the books: {why(error)}"
            failure = BooksError(what)
            failure.__cause__ = error
            entry.written.set_exception(failure)
