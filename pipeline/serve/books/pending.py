"""The folder beside the books for what is not in them yet, and how the next server brings it in."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, IntegrityError

from pipeline.serve.books import tables
from pipeline.serve.books.database import folder_beside, why
from pipeline.serve.books.spool import Row, read_rows

log = logging.getLogger(__name__)

ROW_FAULTS = (IntegrityError, DataError)
"""A row is not fit to be written; any other failure is the books' own."""
SPOOL, JOURNAL = ".spool", ".journal"
_AT_ONCE = 500


def pending_folder(url: URL) -> Path:
    """Where rows wait that are not in the books yet."""
    return folder_beside(url, "pending")


def bring_in(books: Engine, folder: Path) -> int:
    """Write what processes that have ended left behind; how many rows it was.

    A process that still runs keeps its files locked, and they are let be.
    """
    num_rows = 0
    for spool in sorted(folder.glob(f"*{SPOOL}")):
        with _claimed(spool) as is_ours:
            if is_ours:
                journal = spool.with_suffix(JOURNAL)
                # A reply is in both if it ended: the row in the spool is the whole one.
                num_rows += insert_missing(books, read_rows(spool))
                num_rows += insert_missing(books, _latest(read_rows(journal)))
                journal.unlink(missing_ok=True)
                spool.unlink(missing_ok=True)
    return num_rows


def insert_missing(books: Engine, rows: Sequence[Row]) -> int:
    """Write those whose ids are not there; one that is not fit is told to the log."""
    num_written = 0
    for begin in range(0, len(rows), _AT_ONCE):
        some = rows[begin : begin + _AT_ONCE]
        try:
            num_written += _insert_missing(books, some)
        except ROW_FAULTS as error:
            if len(rows) == 1:
                log.error("%s is not fit for the books: %s", rows[0]["id"], why(error))
            else:
                num_written += sum(insert_missing(books, [row]) for row in some)
    return num_written


def _insert_missing(books: Engine, rows: Sequence[Row]) -> int:
    speaks = sqlite if books.dialect.name == "sqlite" else postgresql
    insert = speaks.insert(tables.generations).on_conflict_do_nothing()
    with books.begin() as connection:
        return sum(connection.execute(insert, dict(row)).rowcount for row in rows)


def _latest(rows: Sequence[Row]) -> list[Row]:
    """The last line of each reply."""
    return list({row["id"]: row for row in rows}.values())


@contextlib.contextmanager
def _claimed(file: Path) -> Iterator[bool]:
    """Whether nobody else has it open, nor may take it meanwhile."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
