"""The records of one file, whatever it is written as and compressed with."""

import csv
import io
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO

import pyarrow as pa

from pipeline.data.conversation import Record
from pipeline.data.json_text import read_json_text
from pipeline.data.parquet import read_parquet
from pipeline.data.strict_json import parse_json
from pipeline.errors import DataError
from pipeline.sources import file_kind

LONGEST_LINE_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NOT_TEXT = {
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard; let its name end in .zst",
    b"PAR1": "Parquet; let its name end in .parquet",
    b"PK\x03\x04": "a zip archive; unpack it",
}


def read_records(path: Path) -> Iterator[Record | DataError]:
    """Each record of a file with the line it begins on, or the DataError that says what is wrong.

    A name's ending says what a file is: JSON lines (and whatever has another ending), JSON, CSV or
    Parquet, where the line is the number of the row, each as it is or with .gz or .zst.
    Faults of a record are given, not raised, so that the caller decides between refusing and
    dropping. DataError is raised for a fault after which nothing more can be read, and for a file
    that is missing or holds no record. Records go through memory a few at a time, but a .json file
    is read whole unless each line of it is a record: large data belongs in JSON lines or Parquet.
    """
    num_found = 0
    try:
        with _open(path) as stream:
            for found in _read(path, stream):
                num_found += 1
                yield found
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; data.sources paths start at {Path.cwd()}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not num_found:
        raise DataError(f"{path} is empty: it needs at least one record")


def _read(path: Path, stream: IO[bytes]) -> Iterator[Record | DataError]:
    match file_kind(path):
        case ".parquet":
            return _read_parquet(path, stream)
        case ".csv":
            return _read_csv(path, _read_lines(path, stream, LONGEST_LINE_BYTES))
        case ".json":
            return _read_json(path, _read_lines(path, stream, -1))
        case _:
            return _read_json_lines(path, _read_lines(path, stream, LONGEST_LINE_BYTES))


def _compression(path: Path) -> str | None:
    return {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked."""
    with path.open("rb") as file:
        compression = _compression(path)
        if compression is None:
            yield file
            return
        with pa.input_stream(file, compression=compression) as unpacked:
            yield io.BufferedReader(unpacked, _CHUNK_BYTES)


def _damage(path: Path, line: int, error: OSError) -> DataError:
    if _compression(path) is None:
        return DataError.at(path, line, f"the file cannot be read on: {error.strerror or error}")
    early = "Truncated" in str(error)
    what = "ends early" if early else "is damaged or not what its name says"
    return DataError.at(path, line, f"the compressed file {what}; copy it again")


def _read_lines(path: Path, stream: IO[bytes], longest_bytes: int) -> Iterator[str]:
    """Each line as text with its line end; raises DataError at the line that cannot be had."""
    line = 1
    try:
        while raw := stream.readline(longest_bytes):
            if len(raw) == longest_bytes and not raw.endswith(b"\n"):
                size = f"{longest_bytes // 2**20} MiB"
                raise DataError.at(
                    path, line, f"a line longer than {size}; is it one record a line?"
                )
            if line == 1:
                raw = _check_beginning(path, raw)
            yield raw.decode("utf-8")
            line += 1
    except UnicodeDecodeError as error:
        raise DataError.at(
            path, line, f"not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise _damage(path, line, error) from error


def _check_beginning(path: Path, raw: bytes) -> bytes:
    """The first line without a byte order mark; raises DataError if it is no text's beginning."""
    for beginning, name in _NOT_TEXT.items():
        if raw.startswith(beginning):
            raise DataError.at(path, 1, f"not UTF-8 text: it begins like {name}")
    return raw.removeprefix(_BYTE_ORDER_MARK)


def _read_json_lines(path: Path, lines: Iterable[str]) -> Iterator[Record | DataError]:
    for line, text in enumerate(lines, start=1):
        if text.strip():
            try:
                yield Record(parse_json(text.rstrip()), path, line)
            except DataError as error:
                yield DataError.at(path, line, str(error))


def _read_json(path: Path, lines: Iterator[str]) -> Iterator[Record | DataError]:
    """A list of records, one record, or records one after the other, as in JSON lines."""
    head = []
    for text in lines:
        head.append(text)
        if text.strip():
            break
    if head and _is_object(head[-1]):
        return _read_json_lines(path, chain(head, lines))
    return read_json_text(path, "".join(chain(head, lines)))


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except DataError:
        return False


def _read_csv(path: Path, lines: Iterator[str]) -> Iterator[Record | DataError]:
    """Rows below a header, cells as text; raises DataError where the quoting breaks."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            if cells and not header:
                header = _check_header(path, line, cells)
            elif cells and len(cells) != len(header):
                what = f"{len(cells)} cells, but the header has {len(header)} columns"
                yield DataError.at(path, line, what)
            elif cells:
                yield Record(dict(zip(header, cells, strict=True)), path, line)
            line = reader.line_num + 1
    except csv.Error as error:
        is_open = "end of data" in str(error)
        what = "a quote opens in this row and never closes" if is_open else str(error)
        raise DataError.at(path, line, f"not CSV: {what.partition(' - ')[0]}") from error


def _check_header(path: Path, line: int, names: list[str]) -> list[str]:
    fault = None
    if len(names) == 1 and re.search(r"[;\t]", names[0]):
        fault = "columns must be separated by commas"
    elif not all(name.strip() for name in names):
        fault = "a column has no name; if it is an index, let pandas write with index=False"
    elif len(set(names)) < len(names):
        fault = "two columns have the same name"
    if fault:
        raise DataError.at(path, line, fault)
    return names


def _read_parquet(path: Path, stream: IO[bytes]) -> Iterator[Record | DataError]:
    if _compression(path) is None:
        yield from read_parquet(path, stream)
        return
    with tempfile.TemporaryFile() as unpacked:  # Parquet is read from its end
        for chunk in _read_chunks(path, stream):
            unpacked.write(chunk)
        yield from read_parquet(path, unpacked)


def _read_chunks(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    try:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk
    except OSError as error:
        raise _damage(path, 1, error) from error
