"""Files of rows, for tests that need one without the data stage."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from pipeline.data.rows import Row
from pipeline.data.store import ROWS, Writer, to_batch

_BATCH_ROWS = 1000


def write_rows(path: Path, rows: Iterable[Row]) -> str:
    """Write a file of rows; returns the sha256 of their ids."""
    source = iter(rows)
    with Writer(path, ROWS) as writer:
        while some := list(islice(source, _BATCH_ROWS)):
            writer.write(to_batch(some, ROWS))
    return writer.sha256
