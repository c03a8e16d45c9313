"""A training that has lost its numbers, or whose loss explodes, stops and says where."""

import math
from collections import deque
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import RunError
from pipeline.train.checkpoint import Checkpoints

SHOWN = 3  # rows named in the sentence
EXCESS = 3.0
"""Nats a token above the best so far: each right token has become twenty times less likely. A
language model's loss is between 1 and 3, and that of guessing 12, so it stands far out of both."""
IN_A_ROW = 3
"""Steps; one or two may have strange rows, where steps are of few rows."""
WINDOW = 10
"""Steps whose mean is compared with; a single one may have had easy rows."""


class Planned(Protocol):
    """Which rows each step learns from."""

    rows: Any
    """A data set with the column `source`."""
    plan: list[list[int]]


class ExplosionWatch:
    """Says from which step on a loss has exploded, given the losses one after the other.

    It has when `IN_A_ROW` steps are each more than `EXCESS` above the lowest mean of up to `WINDOW`
    consecutive steps so far, and at least `IN_A_ROW`.
    """

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._lowest = math.inf
        self._num_high = 0

    def add(self, step: int, loss: float) -> int | None:
        """The first step of the explosion, once there is one."""
        self._num_high = self._num_high + 1 if loss > self._lowest + EXCESS else 0
        self._window.append(loss)
        if len(self._window) >= IN_A_ROW:
            self._lowest = min(self._lowest, sum(self._window) / len(self._window))
        return step - IN_A_ROW + 1 if self._num_high >= IN_A_ROW else None


class StopOnExplosion(TrainerCallback):
    """Raises RunError after a step whose loss or gradient is no number, or whose loss explodes.

    That is before it is logged. What is logged is the mean of all processes, so that all of them
    stop at the same step. Only the loss of `sft` is in nats a token, and can be said to explode.
    """

    def __init__(self, steps: Planned, checkpoints: Checkpoints, objective: str) -> None:
        self._steps = steps
        self._checkpoints = checkpoints
        self._watch = ExplosionWatch() if objective == "sft" else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take over the losses before the checkpoint a training goes on from."""
        for entry in state.log_history:
            if self._watch and "loss" in entry:
                self._watch.add(entry["step"], entry["loss"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Name the step, its first rows and the last checkpoint from before."""
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        for key, what in (("loss", "loss"), ("grad_norm", "gradient")):
            value = float(logs.get(key, 0.0))
            if not math.isfinite(value):
                self._stop(f"the {what} of step {step} is {value}", step, step)
        first = self._watch.add(step, logs["loss"]) if self._watch else None
        if first is not None:
            # The loss of a step is that of the weights after the step before it.
            what = f"the loss explodes from step {first} on, to {logs['loss']:.2f} at step {step}"
            self._stop(what, step, first - 1)

    def _stop(self, what: str, step: int, before: int) -> None:
        newest = self._checkpoints.newest(before)
        last = f"the last good checkpoint is {newest}" if newest else "no checkpoint is from before"
        raise RunError(
            f"{what}, learning from {self._rows(step)}; {last}; a lower train.learning_rate "
            "or more train.warmup_steps may help"
        )

    def _rows(self, step: int) -> str:
        sources = list(dict.fromkeys(self._steps.rows[self._steps.plan[step - 1]]["source"]))
        more = f" and {len(sources) - SHOWN} more" if len(sources) > SHOWN else ""
        return ", ".join(sources[:SHOWN]) + more
