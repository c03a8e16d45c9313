"""Rows on disk: an Arrow stream, written in batches, read back without loading it whole."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.rows import Row

SCHEMA = pa.schema(
    [
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("source", pa.string()),
        ("turn", pa.int32()),
        ("mode", pa.string()),
    ]
)
_BATCH_ROWS = 1000


def write_rows(path: Path, rows: Iterable[Row]) -> str:
    """Write rows as an Arrow stream; returns the sha256 of their ids."""
    digest = hashlib.sha256()
    source = iter(rows)
    with path.open("wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
        while batch := list(islice(source, _BATCH_ROWS)):
            for row in batch:
                digest.update(f"{row.prompt_ids}{row.completion_ids}".encode())
            columns = [pa.array([getattr(r, f.name) for r in batch], f.type) for f in SCHEMA]
            stream.write_batch(pa.record_batch(columns, schema=SCHEMA))
    return digest.hexdigest()


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file written by `write_rows`, in order."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            values: list[dict[str, Any]] = batch.to_pylist()
            for value in values:
                yield Row(**value)
