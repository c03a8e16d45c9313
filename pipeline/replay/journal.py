"""Every reply as soon as it is finished, so that a stopped run goes on where it was."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import RunError
from pipeline.replay.judge import Reason


@dataclass(frozen=True)
class Reply:
    """What the base said, under the sha256 of everything it depends on."""

    key: str
    text: str
    num_tokens: int
    reason: Reason | None
    """Why it is not kept; None if it is."""


class Journal:
    """A file of one JSON object a reply, in the order in which they were finished."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Reply]:
        """The replies by key. A line that is none, torn by a crash, is as if it were not there."""
        replies = {}
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RunError(f"{self._path} cannot be read: {error.strerror}") from error
        for line in lines:
            try:
                reply = Reply(**json.loads(line))
            except (ValueError, TypeError):
                continue
            replies[reply.key] = reply
        return replies

    def repair(self) -> None:
        """Cut off a torn last line, so that the next one begins where a line begins."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error.strerror}") from error

    def append(self, reply: Reply) -> None:
        """Write a reply so that not even a crash of the machine loses it."""
        line = json.dumps(asdict(reply), ensure_ascii=False) + "\n"
        try:
            with self._path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error.strerror}") from error
