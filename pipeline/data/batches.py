"""Records to rows in batches, side by side in several processes, in the order of the files."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa

from pipeline.chat import Chat, reasoning_of, text_of
from pipeline.data.conversation import Conversation, Document, Pair, Record, Sample, source_of
from pipeline.data.duplicates import Fingerprint, fingerprint
from pipeline.data.formats import detect, parse
from pipeline.data.mix import draw
from pipeline.data.notes import Notes
from pipeline.data.rows import PairRow, Row, make_pair_rows, make_rows, make_text_rows
from pipeline.data.secrets import find_secrets
from pipeline.data.store import PAIRS, ROWS, to_batch
from pipeline.data.tally import Tally
from pipeline.errors import DataError, RunError
from pipeline.recipe import Data, Format
from pipeline.tree import count_tree_tokens

IN_PROCESS = 4
"""So many batches are made here first: a process of its own takes longer to start than they do."""
STEP_ROWS = 16
"""How many rows are taken to share a beginning, for the estimate of an epoch's tokens."""
MAX_PROCESSES = 8
"""More would wait for the one that reads and writes."""


@dataclass(frozen=True)
class Job:
    """Some records of one source, and what is to become of them."""

    source: str
    """Its name: the same conversation in two sources has two chances."""
    records: list[Record | DataError]
    form: Format | None
    """None where none of the records has a known one."""
    weight: float
    held: bool | None
    """Whether all of them are held out, or none; None leaves it to data.eval.share."""


@dataclass
class Part:
    """What a batch adds to the training or to the held-out part."""

    rows: list[Row] = field(default_factory=list)
    pairs: list[PairRow] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)


@dataclass
class Batch:
    """What some records have become."""

    train: pa.RecordBatch
    held: pa.RecordBatch
    train_pairs: pa.RecordBatch
    held_pairs: pa.RecordBatch
    train_tally: Tally
    held_tally: Tally
    tree_tokens: int
    """Of the training rows, with the beginnings shared that a step's rows have in common."""
    notes: Notes
    fingerprints: list[Fingerprint]
    secrets: list[tuple[str, str]]
    """Kind and place of each."""


@dataclass(frozen=True)
class Maker:
    """Makes batches: all that is needed to make rows of records."""

    data: Data
    seed: int
    chat: Chat

    def make(self, job: Job) -> Batch:
        """A batch; raises the DataError of the first record that is at fault under `refuse`."""
        notes, train, held = Notes(), Part(), Part()
        fingerprints, secrets = [], []
        for record in job.records:
            try:
                sample = _parse(record, job.form)
                print_ = fingerprint(sample, held=False)
                if self._is_held(print_, job):
                    copies, part, print_ = 1, held, replace(print_, held=True)
                else:
                    copies, part = self._num_copies(print_, job), train
                if copies:
                    self._add(sample, part, copies, notes)
            except DataError as error:
                if self.data.invalid == "refuse":
                    raise
                notes.add("invalid", str(error))
                continue
            if copies:
                fingerprints.append(print_)
                kinds = (kind for text in _texts(sample) for kind in find_secrets(text))
                secrets += [(kind, source_of(sample)) for kind in kinds]
        ids = [(row.prompt_ids, row.completion_ids) for row in train.rows]
        steps = range(0, len(ids), STEP_ROWS)
        return Batch(
            to_batch(train.rows, ROWS),
            to_batch(held.rows, ROWS),
            to_batch(train.pairs, PAIRS),
            to_batch(held.pairs, PAIRS),
            train.tally,
            held.tally,
            sum(count_tree_tokens(ids[start : start + STEP_ROWS]) for start in steps),
            notes,
            fingerprints,
            secrets,
        )

    def _add(self, sample: Sample, part: Part, copies: int, notes: Notes) -> None:
        """Make a sample's rows and count them, `copies` times."""
        if isinstance(sample, Pair):
            pairs = make_pair_rows(sample, self.chat, self.data, notes)
            part.pairs += pairs * copies
            part.tally.counts["conversations"] += len(pairs) * copies
            for pair in pairs:
                part.tally.add_pair(pair, copies)
            return
        if isinstance(sample, Document):
            rows = make_text_rows(sample, self.chat, self.data, notes)
        else:
            rows = make_rows(sample, self.chat, self.data, self.seed, notes)
            if rows:
                part.tally.add_conversation(sample, copies)
        part.tally.counts["conversations"] += copies if rows else 0
        for row in rows:
            part.tally.add_row(row, copies, isinstance(sample, Conversation) and bool(sample.tools))
        part.rows += rows * copies

    def _is_held(self, print_: Fingerprint, job: Job) -> bool:
        """By what a model would see of it, so that copies are held out together."""
        if job.held is not None:
            return job.held
        return draw(self.seed, "held", print_.exact) < (self.data.eval.share or 0)

    def _num_copies(self, print_: Fingerprint, job: Job) -> int:
        whole, part = divmod(job.weight, 1)
        drawn = draw(self.seed, f"copies from {job.source}", print_.exact)
        return int(whole) + (drawn < part)


def make_batches(jobs: Iterator[Job], data: Data, seed: int, base: Path) -> Iterator[Batch]:
    """Batches of jobs, in their order; raises what the first failing job raises.

    A few batches are made in this process, the others in one for each core, a few at a time, so
    that memory does not grow with the number of records.
    """
    maker = Maker(data, seed, Chat(base))
    for job in islice(jobs, IN_PROCESS):
        yield maker.make(job)
    first = next(jobs, None)
    if first is not None:
        try:
            yield from _make_side_by_side(chain([first], jobs), (data, seed, base))
        except BrokenProcessPool as error:
            what = "a process that makes rows was killed, most likely for want of memory"
            raise RunError(
                f"{what}; close other programs, or give shorter conversations"
            ) from error


def _make_side_by_side(jobs: Iterator[Job], maker: tuple[Data, int, Path]) -> Iterator[Batch]:
    num_processes = min(_num_cores(), MAX_PROCESSES)
    context = multiprocessing.get_context("spawn")  # tokenizers' threads do not survive a fork
    with ProcessPoolExecutor(num_processes, context, _start, maker) as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for job in jobs:
                with _interrupts_blocked():
                    waiting.append(pool.submit(_make, job))
                if len(waiting) > 2 * num_processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # it may be that nobody wants the rest


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes that are started meanwhile never hear of Ctrl-C: it is this one's to answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _num_cores() -> int:
    """How many this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_maker: Maker | None = None  # of a worker process: it lives as long as the process


def _start(data: Data, seed: int, base: Path) -> None:
    """Set a worker process up: it ends with its parent."""
    global _maker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _maker = Maker(data, seed, Chat(base))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(job: Job) -> Batch:
    assert _maker is not None
    return _maker.make(job)


def _parse(record: Record | DataError, form: Format | None) -> Sample:
    if isinstance(record, DataError):
        raise record
    return parse(record, form or detect(record))


def _texts(sample: Sample) -> Iterator[str]:
    """Every text a model would see of it, one by one, but for tool schemas."""
    if isinstance(sample, Document):
        yield sample.text
        return
    messages = list(sample.messages)
    if isinstance(sample, Pair):
        messages += [*sample.chosen, *sample.rejected]
    for message in messages:
        yield text_of(message.get("content"))
        yield reasoning_of(message)
        for call in message.get("tool_calls") or ():
            yield str(call.get("function", call).get("arguments"))
