"""Records of a JSON text that is read element by element, so that each knows its line."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.conversation import Record
from pipeline.data.strict_json import DECODER, check_value, explain_json
from pipeline.errors import DataError

_SPACE = re.compile(r"[ \t\r\n]*")


def read_json_text(path: Path, text: str) -> Iterator[Record | DataError]:
    """Records that stand in one list, or one after the other without one.

    Half a character or deep nesting is given as its record's fault; DataError is raised where the
    text ends being JSON.
    """
    reader = _Reader(path, text)
    return reader.read_list() if reader.take("[") else reader.read_values()


@dataclass
class _Reader:
    path: Path
    text: str
    at: int = 0
    line: int = 1

    def read_list(self) -> Iterator[Record | DataError]:
        """The elements of a list that has been opened."""
        if not self.take("]"):
            yield self.read_record()
            while self.take(","):
                yield self.read_record()
            if not self.take("]"):
                raise self.fault("a , or ] is missing")
        if not self.is_at_end():
            raise self.fault("there is more after the list")

    def read_values(self) -> Iterator[Record | DataError]:
        """Values up to the text's end."""
        while not self.is_at_end():
            yield self.read_record()

    def take(self, sign: str) -> bool:
        """Whether this sign comes next; if so, go past it."""
        self.skip_space()
        is_next = self.text.startswith(sign, self.at)
        self.at += is_next
        return is_next

    def is_at_end(self) -> bool:
        """Whether only space is left."""
        self.skip_space()
        return self.at == len(self.text)

    def skip_space(self) -> None:
        """Go to what comes next."""
        found = _SPACE.match(self.text, self.at)
        self.move(found.end() if found else self.at)

    def move(self, end: int) -> None:
        """Go on to a place, counting lines."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def fault(self, what: str) -> DataError:
        """What is wrong at this place."""
        return DataError.at(self.path, self.line, f"not JSON: {what}")

    def read_record(self) -> Record | DataError:
        """The value that comes next, and go past it."""
        self.skip_space()
        begin, line = self.at, self.line
        try:
            value, end = DECODER.raw_decode(self.text, begin)
        except (ValueError, RecursionError) as error:
            place = ""
            if isinstance(error, json.JSONDecodeError):
                self.move(error.pos)
                place = f" at character {error.colno}"
            raise self.fault(explain_json(error) + place) from error
        self.move(end)
        try:
            check_value(value, self.text[begin:end])
        except DataError as error:
            return DataError.at(self.path, line, str(error))
        return Record(value, self.path, line)
