"""Checkpoints of a training: whole ones only, of the same inputs only; and when they are made."""

import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import RunError
from pipeline.recipe import Train
from pipeline.run import publish, write_json

log = logging.getLogger(__name__)
KEPT = 2  # the newest alone would do; the one before it is for a file system that loses one
NOTE = "pipeline.json"


@dataclass(frozen=True)
class Note:
    """What we write into a checkpoint, beside what the trainer does."""

    inputs: Mapping[str, str]
    """What the training is made from: a checkpoint of other inputs is none of ours."""
    metrics_bytes: int
    """How long metrics.jsonl was."""
    seconds: float
    """How long the training had taken."""
    made_with: Mapping[str, Any]
    """Torch's build, threads, processes and what is in memory at once: with others the last bits
    come out differently."""


@dataclass(frozen=True)
class Checkpoints:
    """The folder with the checkpoints of one training: checkpoint-STEP, the newest two."""

    folder: Path
    inputs: Mapping[str, str]

    def newest(self, before: int | None = None) -> Path | None:
        """The last one that is whole and of the same inputs, of fewer than so many steps."""
        usable = [path for path in self._usable() if before is None or step_of(path) < before]
        return usable[-1] if usable else None

    def tidy(self, resume: str) -> None:
        """Remove what cannot be gone on from, or everything if `resume` is never."""
        keep = [] if resume == "never" else self._usable()[-KEPT:]
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path not in keep:
                _remove(path)

    def add(self, filled: Path, note: Note) -> None:
        """Give a folder that the trainer has filled its place here; RunError if the disk fails."""
        try:
            write_json(filled / NOTE, vars(note))
            self.folder.mkdir(exist_ok=True)
            publish(filled, self.folder / filled.name)
        except OSError as error:
            what = f"{self.folder / filled.name} cannot be written: {error.strerror}"
            raise RunError(what) from error
        for path in self._usable()[:-KEPT]:
            _remove(path)

    def clear(self) -> None:
        """Remove them all: the training is done."""
        self.tidy("never")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _usable(self) -> list[Path]:
        found = []
        for path in self.folder.glob("checkpoint-*"):
            note = read_note(path)
            if note is not None and note.inputs == dict(self.inputs) and _has_step(path):
                found.append(path)
        return sorted(found, key=step_of)


def read_note(checkpoint: Path) -> Note | None:
    """Our note in a checkpoint; None where there is none that can be read."""
    try:
        return Note(**json.loads((checkpoint / NOTE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def step_of(checkpoint: Path) -> int:
    """How many steps had been made."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _remove(checkpoint: Path) -> None:
    """The note first: half a checkpoint must not be taken for a whole one."""
    (checkpoint / NOTE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _has_step(checkpoint: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", checkpoint.name) is not None


def describe_torch() -> dict[str, Any]:
    """What the last bits of a training depend on, beside the machine."""
    return {"torch_build": torch.__version__, "torch_threads": torch.get_num_threads()}


class Saver(TrainerCallback):
    """Says when a checkpoint is due, puts it in its place, and makes Ctrl-C wait for one."""

    def __init__(
        self, settings: Train, accelerator: Accelerator, checkpoints: Checkpoints, metrics: Path
    ) -> None:
        self.is_stopped = False
        """Whether the training has ended before its time, on Ctrl-C."""
        self._settings = settings
        self._accelerator = accelerator
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._is_asked = False
        self._earlier_seconds = 0.0
        self._started = self._last = time.monotonic()
        processes = {"processes": accelerator.num_processes}
        layout = {"micro_tokens": settings.micro_tokens, "checkpointing": settings.checkpointing}
        self._made_with = describe_torch() | processes | layout

    @property
    def seconds(self) -> float:
        """How long the training has taken so far, without pauses."""
        return self._earlier_seconds + time.monotonic() - self._started

    def go_on_from(self, checkpoint: Path, note: Note) -> None:
        """Take over the time, and say from where it goes on."""
        self._earlier_seconds = note.seconds
        self._started = self._last = time.monotonic()
        log.info("going on from step %d, %s", step_of(checkpoint), checkpoint)
        if note.made_with != self._made_with:
            log.info(
                "the last bits will differ: it was made with %s, now it is %s",
                note.made_with,
                self._made_with,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint, and for the end after Ctrl-C; not after the last step."""
        if state.global_step >= state.max_steps or control.should_training_stop:
            return
        minutes = (time.monotonic() - self._last) / 60
        every = self._settings.save_steps
        is_due = minutes >= self._settings.save_minutes or (
            every is not None and state.global_step % every == 0
        )
        is_asked, is_due = self._agree(self._is_asked, is_due)
        if is_asked:
            self.is_stopped = True
            control.should_training_stop = True
        control.should_save = is_asked or is_due

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """All processes have written their part: the whole gets its name."""
        self._accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            with self._metrics.open("rb") as file:
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
            note = Note(dict(self._checkpoints.inputs), size, self.seconds, self._made_with)
            self._checkpoints.add(Path(args.output_dir) / f"checkpoint-{state.global_step}", note)
        self._accelerator.wait_for_everyone()
        self._last = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Ctrl-C in this block waits for the end of the step; a second one does not.

        Where Ctrl-C is ignored, or somebody else's, it stays so.
        """
        is_ours = threading.current_thread() is threading.main_thread()
        if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _hear(self, *_: Any) -> None:
        # A launcher passes on a Ctrl-C that may have come to us already; it ends us at a second.
        if self._accelerator.num_processes == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._is_asked = True
        log.info("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    def _agree(self, *flags: bool) -> list[bool]:
        """Whether any process says so: their clocks differ, and not all hear Ctrl-C at once."""
        if self._accelerator.num_processes == 1:
            return list(flags)
        said = torch.tensor(flags, dtype=torch.int32, device=self._accelerator.device)
        return [bool(count) for count in self._accelerator.reduce(said).tolist()]
