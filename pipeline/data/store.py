"""Rows on disk: Arrow streams, written in batches, read back without loading them whole."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from pipeline.data.rows import PairRow, Row

_IDS = pa.list_(pa.int32())
ROWS = pa.schema(
    [
        ("prompt_ids", _IDS),
        ("completion_ids", _IDS),
        ("source", pa.string()),
        ("turn", pa.int32()),
        ("mode", pa.string()),
    ]
)
PAIRS = pa.schema(
    [
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        ("source", pa.string()),
        ("mode", pa.string()),
    ]
)


def to_batch(rows: Sequence[Row] | Sequence[PairRow], schema: pa.Schema) -> pa.RecordBatch:
    """Rows in Arrow's form."""
    columns = [pa.array([getattr(row, f.name) for row in rows], f.type) for f in schema]
    return pa.record_batch(columns, schema=schema)


class Writer:
    """A file of rows that grows batch by batch; use it as a context manager."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Open it; OSError if that fails."""
        self._file = path.open("wb")
        self._stream = pa.ipc.new_stream(self._file, schema)
        columns = [f.name for f in schema if f.type == _IDS]
        # Lengths and ids apart, so that it does not matter how rows came in batches.
        self._lengths = {name: hashlib.sha256() for name in columns}
        self._ids = {name: hashlib.sha256() for name in columns}
        self.num_rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows."""
        if not batch.num_rows:
            return
        self.num_rows += batch.num_rows
        for name in self._ids:
            column = batch.column(name)
            self._lengths[name].update(column.value_lengths().to_numpy().tobytes())
            self._ids[name].update(column.flatten().to_numpy().tobytes())
        self._stream.write_batch(batch)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._file.close()

    @property
    def sha256(self) -> str:
        """Of all ids so far and the rows they are cut into."""
        digests = [*self._lengths.values(), *self._ids.values()]
        return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, in order; of pairs both replies' rows."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            for value in batch.to_pylist():
                yield from _to_rows(value)


def read_spread(path: Path, number: int) -> list[Row]:
    """Some of a file's rows or pairs, evenly spread over it."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        table = stream.read_all()
        number = min(number, table.num_rows)
        chosen = [place * table.num_rows // number for place in range(number)]
        values = table.take(pa.array(chosen, pa.int64())).to_pylist()
        return [row for value in values for row in _to_rows(value)]


def _to_rows(value: dict[str, Any]) -> list[Row]:
    """A row, or those of a pair; the source then says which reply it is."""
    if "completion_ids" in value:
        return [Row(**value)]
    prompt, place, mode = value["prompt_ids"], value["source"], value["mode"]
    return [
        Row(prompt, value[f"{reply}_ids"], f"{place} {reply}", 0, mode)
        for reply in ("chosen", "rejected")
    ]
