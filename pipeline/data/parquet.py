"""Rows of a Parquet file as JSON-like values."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet

from pipeline.data.conversation import Record
from pipeline.errors import DataError

_BATCH_ROWS = 256


def read_parquet(path: Path, stream: IO[bytes]) -> Iterator[Record]:
    """Rows, numbered from 1, without what a column or a struct has no value for.

    A struct cannot say that a key is absent, only that it is null; so null is absent everywhere.
    Raises DataError at the first row that cannot be read. The stream must be able to seek.
    """
    row = 1
    try:
        for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(_BATCH_ROWS):
            for value in batch.to_pylist(maps_as_pydicts="lossy"):
                yield Record(_without_nulls(value), path, row)
                row += 1
    except UnicodeDecodeError as error:
        what = f"the text of this row or of one of the next {_BATCH_ROWS} is not UTF-8"
        raise DataError.at(path, row, what) from error
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError.at(path, row, f"not Parquet that can be read: {reason}") from error


def _without_nulls(value: Any) -> Any:
    """A value of a Parquet file as JSON has it, or None.

    Dates and decimals become text, bytes the text they are, or nothing, like an image; a number
    that is none, which pandas writes where it misses one, becomes nothing too.
    """
    match value:
        case dict():
            cleaned = {str(key): _without_nulls(item) for key, item in value.items()}
            return {key: item for key, item in cleaned.items() if item is not None}
        case list() | tuple():
            return [_without_nulls(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return _text_of_bytes(value)
        case None | str() | int():
            return value
    return str(value)


def _text_of_bytes(value: bytes) -> str | None:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None
