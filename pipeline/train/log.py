"""What is told of a run while it runs: metrics.jsonl and a progress line."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.train.trainer import PackTrainer

log = logging.getLogger(__name__)


class StepLog(TrainerCallback):
    """Writes metrics.jsonl, and a progress line every few seconds.

    Of what the file holds the first `num_bytes` stay: up to the checkpoint a training goes on from.
    """

    def __init__(self, path: Path, trainer: PackTrainer, num_bytes: int = 0) -> None:
        self._path = path
        self._trainer = trainer
        self._num_bytes = num_bytes
        self._first_step = 0
        self._started = self._last = self._spoken = 0.0
        self._tokens = self._row_tokens = self._supervised = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take back what came after the checkpoint, and set the clock to zero."""
        if state.is_world_process_zero:
            with self._path.open("ab") as file:
                file.truncate(min(file.tell(), self._num_bytes))
        self._first_step = state.global_step
        self._started = self._last = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """One object a step, of all processes together; `num_row_tokens` is without sharing."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        now = time.monotonic()
        line = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": float(logs["learning_rate"]),
            "num_supervised_tokens": self._trainer.num_supervised_tokens - self._supervised,
            "num_tokens": self._trainer.num_tokens - self._tokens,
            "num_row_tokens": self._trainer.num_row_tokens - self._row_tokens,
            "seconds": round(now - self._last, 4),
        }
        self._tokens = self._trainer.num_tokens
        self._row_tokens = self._trainer.num_row_tokens
        self._supervised = self._trainer.num_supervised_tokens
        self._last = now
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if now - self._spoken > 5 or state.global_step in (self._first_step + 1, state.max_steps):
            self._spoken = now
            self._say(state, line["loss"], now - self._started)

    def _say(self, state: TrainerState, loss: float, seconds: float) -> None:
        seconds_a_step = seconds / (state.global_step - self._first_step)
        log.info(
            "step %d of %d  loss %.3f  %.0f tokens/s (%.0f supervised)  %.0f s left",
            state.global_step,
            state.max_steps,
            loss,
            self._tokens / seconds,
            self._supervised / seconds,
            seconds_a_step * (state.max_steps - state.global_step),
        )
