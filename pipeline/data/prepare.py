"""The data stage: sources to rows on disk, checked and counted, with the held-out part apart."""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.data.batches import Batch, make_batches
from pipeline.data.duplicates import Duplicates
from pipeline.data.inputs import find_inputs
from pipeline.data.notes import MAX_EXAMPLES, Notes
from pipeline.data.store import PAIRS, ROWS, Writer
from pipeline.data.tally import Tally
from pipeline.data.warn import warnings_of
from pipeline.errors import DataError
from pipeline.recipe import Data
from pipeline.run import whole_folder, write_json

log = logging.getLogger(__name__)


REPORT = "report.json"
FILES = (
    ("train.arrow", ROWS),
    ("eval.arrow", ROWS),
    ("train_pairs.arrow", PAIRS),
    ("eval_pairs.arrow", PAIRS),
)
SPEAK_S = 5
"""Seconds between two lines of progress."""


def prepare(
    data: Data,
    base: Path,
    seed: int,
    out: Path,
    fetched: Mapping[str, Sequence[Path]] | None = None,
) -> dict[str, Any]:
    """Write training and held-out rows and a report into a folder; returns the report.

    `base` holds the tokenizer and template; `fetched` are the files of hub data sets, by their
    source's name. Rows go from the sources to the disk a few hundred conversations at a time.
    Raises DataError at the first conversation that cannot become rows, or drops it with a count
    under `invalid: drop`. Nothing is left under `out` then, or what was there before.
    """
    with whole_folder(out) as temporary:
        report = _Preparation(data, base, seed, fetched or {}, temporary).run()
        write_json(temporary / REPORT, report)
    return report


class _Preparation:
    """One run of the stage: what it reads, and what it has counted so far."""

    def __init__(
        self,
        data: Data,
        base: Path,
        seed: int,
        fetched: Mapping[str, Sequence[Path]],
        folder: Path,
    ) -> None:
        self._data, self._base, self._seed = data, base, seed
        self._folder = folder
        self._inputs = find_inputs(data, fetched)
        self._notes = Notes()
        self._train, self._held = Tally(), Tally()
        self._secrets: defaultdict[str, list[str]] = defaultdict(list)
        self._num_secrets: Counter[str] = Counter()
        self._tree_tokens = 0

    def run(self) -> dict[str, Any]:
        jobs = chain.from_iterable(source.jobs() for source in self._inputs)
        batches = make_batches(jobs, self._data, self._seed, self._base)
        with ExitStack() as stack:
            duplicates = stack.enter_context(Duplicates(self._folder))
            train, held, train_pairs, held_pairs = (
                stack.enter_context(Writer(self._folder / name, schema)) for name, schema in FILES
            )
            for batch in _speak(batches):
                train.write(batch.train)
                held.write(batch.held)
                train_pairs.write(batch.train_pairs)
                held_pairs.write(batch.held_pairs)
                for print_ in batch.fingerprints:
                    duplicates.add(print_)
                self._include(batch)
            found, overlap = duplicates.find()
        self._refuse_nothing(
            train.num_rows + train_pairs.num_rows, held.num_rows + held_pairs.num_rows
        )
        report = self._report(found, overlap)
        return report | {"train_sha256": train.sha256, "eval_sha256": held.sha256}

    def _refuse_nothing(self, num_train: int, num_held: int) -> None:
        if not num_train:
            dropped = [s for note in ("invalid", "overlong") for s in self._notes.examples[note]]
            why = f": {dropped[0]}" if dropped else "; see data.max_tokens and data.thinking"
            raise DataError(f"no row is left to train on{why}")
        if not num_held:
            raise DataError("no row is held out; name data.eval.path or raise data.eval.share")

    def _include(self, batch: Batch) -> None:
        self._train.include(batch.train_tally)
        self._held.include(batch.held_tally)
        self._notes.include(batch.notes)
        self._tree_tokens += batch.tree_tokens
        for kind, place in batch.secrets:
            self._num_secrets[kind] += 1
            if len(self._secrets[kind]) < MAX_EXAMPLES and place not in self._secrets[kind]:
                self._secrets[kind].append(place)

    def _report(self, duplicates: Any, overlap: Any) -> dict[str, Any]:
        train, train_histograms = self._train.report()
        held, held_histograms = self._held.report()
        row_tokens = train["prompt_tokens"] + train["supervised_tokens"]
        report = {
            "sources": [source.describe() for source in self._inputs],
            "train": train,
            "eval": held,
            "histograms": {"train": train_histograms, "eval": held_histograms},
            "noted": dict(self._notes.counts),
            "examples": {note: places for note, places in self._notes.examples.items() if places},
            "duplicates": duplicates,
            "overlap": overlap,
            "secrets": {
                kind: {"count": self._num_secrets[kind], "examples": places}
                for kind, places in self._secrets.items()
            },
            "epoch": {"row_tokens": row_tokens, "shared_tokens": self._tree_tokens},
        }
        return report | {"warnings": warnings_of(report, self._data.thinking)}


def _speak(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Say now and then how many conversations are done."""
    started = spoken = time.monotonic()
    num_done = 0
    for batch in batches:
        yield batch
        num_done += len(batch.fingerprints)
        now = time.monotonic()
        if now - spoken > SPEAK_S:
            spoken = now
            log.info("%d conversations, %.0f a second", num_done, num_done / (now - started))
