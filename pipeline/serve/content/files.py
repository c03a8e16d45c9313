"""The content log on the disk: JSON lines in files of one UTC day and one process each."""

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import orjson
from sqlalchemy.engine import URL

from pipeline.errors import DataError
from pipeline.serve.books.database import folder_beside
from pipeline.serve.books.sums import day_of
from pipeline.serve.content.entry import Line

MAX_FILE_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**20
_FILES_IN_ALL = 8
"""At least so many hold what may be kept, so that little goes when the oldest does."""


def content_folder(url: URL) -> Path:
    """Where the content log of some books lies."""
    return folder_beside(url, "content")


class ContentFiles:
    """A folder that several processes write; none of them writes another's files."""

    def __init__(
        self,
        folder: Path,
        keep_days: int,
        max_bytes: int,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """An entry's day is over `keep_days` days ago when it goes; in all are `max_bytes`."""
        self.folder = folder
        self._keep_days = keep_days
        self._max_file_bytes = min(MAX_FILE_BYTES, max_bytes // _FILES_IN_ALL)
        self._max_bytes = max_bytes - self._max_file_bytes  # room for the next file
        self._now_s = now_s
        self._process = uuid4().hex[:12]
        self._numbers: dict[datetime.date, int] = {}

    def append(self, created_ms: int, line: bytes) -> None:
        """To a file of its day; OSError, and nothing of it is there, if it cannot be written."""
        file, is_new = self._file_for(day_of(created_ms), len(line))
        if is_new:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.sweep()
        # Opened each time: another process may have swept it away.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            _write_whole(descriptor, line)
        finally:
            os.close(descriptor)

    def find(self, generation_id: str, created_ms: int) -> Line | None:
        """The entry of a generation; None if there is none."""
        files = [
            (written_s * 1000 < created_ms, written_s, file)
            for file in self.folder.glob(f"{day_of(created_ms)}.*.jsonl")
            for written_s, _ in [_state(file)]
        ]
        for _, _, file in sorted(files):  # the first that was written after it is likely to have it
            for line in _lines(file, generation_id.encode()):
                if line.get("id") == generation_id:
                    return line
        return None

    def sweep(self) -> int:
        """Delete what is too old, and the oldest of what is too much; how many files it was."""
        last = day_of(int(self._now_s() * 1000)) - datetime.timedelta(days=self._keep_days)
        files = sorted(
            (file.name[:10], *_state(file), file) for file in self.folder.glob("*.jsonl")
        )
        total, num_deleted = sum(num_bytes for _, _, num_bytes, _ in files), 0
        for day, _, num_bytes, file in files:
            if total <= self._max_bytes and day >= last.isoformat():
                break
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                file.unlink()
                num_deleted += 1
            total -= num_bytes
        return num_deleted

    def _file_for(self, day: datetime.date, num_bytes: int) -> tuple[Path, bool]:
        """Where it goes, and whether that is not there yet."""
        number = self._numbers.setdefault(day, 0)
        _, size = _state(self._path(day, number))
        if size and size + num_bytes > self._max_file_bytes:
            self._numbers[day] = number + 1
            size = 0
        return self._path(day, self._numbers[day]), not size

    def _path(self, day: datetime.date, number: int) -> Path:
        return self.folder / f"{day}.{number:06}.{self._process}.jsonl"


def read_lines(folder: Path, since: datetime.date | None = None) -> Iterator[Line]:
    """Every entry, a day after the other; DataError for a file of something else."""
    for file in sorted(folder.glob("*.jsonl")):
        if since is None or file.name[:10] >= since.isoformat():
            try:
                yield from _lines(file)
            except orjson.JSONDecodeError as error:
                what = f"{file} is no file of a content log ({error}); name the log's folder"
                raise DataError(what) from error


def _lines(file: Path, word: bytes = b"") -> Iterator[Line]:
    """Those with a word in them; one that was cut off when its process was killed is none."""
    for text in _blocks(file):
        if word in text:  # of a thousand blocks one or none, so lines are not looked at
            for line in text.splitlines():
                if word in line:
                    yield orjson.loads(line)


def _blocks(file: Path) -> Iterator[bytes]:
    """Its text in blocks of whole lines."""
    rest = b""
    try:
        with file.open("rb") as opened:
            while text := opened.read(_BLOCK_BYTES):
                text = rest + text
                end = text.rfind(b"\n") + 1
                rest = text[end:]
                yield text[:end]
    except FileNotFoundError:  # swept away meanwhile
        return


def _write_whole(descriptor: int, line: bytes) -> None:
    begin = os.fstat(descriptor).st_size
    written = 0
    try:
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        os.ftruncate(descriptor, begin)
        raise


def _state(file: Path) -> tuple[float, int]:
    """When it was last written, and its size; zeros if another process has swept it away."""
    try:
        found = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return 0.0, 0
    return found.st_mtime, found.st_size
