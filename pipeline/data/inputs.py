"""A recipe's sources as what is read: files, format, and how often each conversation counts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline.data.batches import Job
from pipeline.data.conversation import Record
from pipeline.data.files import read_records
from pipeline.data.formats import detect
from pipeline.errors import DataError
from pipeline.recipe import Data, Format, Source
from pipeline.sources import find_files

RECORDS = 250
"""How many records are worked on at once."""


@dataclass
class Input:
    """A source, its files, and what has been found out about it."""

    source: Source
    files: Sequence[Path]
    weight: float
    """How often each conversation is trained."""
    held: bool | None
    """Whether all of it is held out, or none; None leaves it to data.eval.share."""
    form: Format | None = None
    """That of its first record that has a known one; None before that is read."""
    num_records: int = 0

    def jobs(self) -> Iterator[Job]:
        """Its records, some at a time, under the format the recipe gives or the first one has."""
        records, wanted = self.records(), self.source.format
        if wanted != "auto":
            self.form = wanted
        while some := list(islice(records, RECORDS)):
            if self.form is None:
                self.form = next(_formats(some), None)
            self.num_records += len(some)
            yield Job(self.source.name, some, self.form, self.weight, self.held)

    def records(self) -> Iterator[Record | DataError]:
        """All that is used of its files, and their faults, in order."""
        return islice(
            chain.from_iterable(read_records(file) for file in self.files), self.source.cap
        )

    def describe(self) -> dict[str, Any]:
        """What the report says of it."""
        return {
            "name": self.source.name,
            "format": self.form or "unknown",
            "files": len(self.files),
            "conversations": self.num_records,
            "weight": self.weight,
            "part": "eval" if self.held else "train",
        }


def _formats(records: Sequence[Record | DataError]) -> Iterator[Format]:
    """The formats of those records that have a known one."""
    for record in records:
        if isinstance(record, Record):
            with suppress(DataError):
                yield detect(record)


def find_inputs(data: Data, fetched: Mapping[str, Sequence[Path]]) -> list[Input]:
    """The sources, and what is held out in files of its own last; DataError if one is missing."""

    def files(source: Source) -> Sequence[Path]:
        return fetched[source.name] if source.hub else find_files(str(source.path))

    held = None if data.eval.share else False
    inputs = [Input(source, files(source), source.weight, held) for source in data.sources]
    _weigh_shares(inputs)
    if data.eval.path:
        source = Source(path=data.eval.path)
        inputs.append(Input(source, files(source), 1.0, held=True))
    return inputs


def _weigh_shares(inputs: list[Input]) -> None:
    """Turn shares of all conversations into weights.

    With n conversations in the sources without a share and s the sum of all shares, a source of
    share t is to have t * n / (1 - s) of them.
    """
    sharing = [each for each in inputs if each.source.share]
    if not sharing:
        return
    others = sum(_count(each) * each.weight for each in inputs if not each.source.share)
    rest = 1 - sum(each.source.share or 0 for each in sharing)
    for each in sharing:
        each.weight = (each.source.share or 0) * others / rest / max(1, _count(each))


def _count(each: Input) -> int:
    return sum(isinstance(record, Record) for record in each.records())
