"""A training that has lost its numbers stops, and says where."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import RunError
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.steps import Steps

SHOWN = 3  # rows named in the sentence


class StopUnlessFinite(TrainerCallback):
    """Raises RunError after a step whose loss or gradient is no number, before it is logged.

    What is logged is the mean of all processes, so that all of them stop at the same step.
    """

    def __init__(self, steps: Steps, checkpoints: Checkpoints) -> None:
        self._steps = steps
        self._checkpoints = checkpoints

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Name the step, its first rows and the last checkpoint."""
        for key, what in (("loss", "loss"), ("grad_norm", "gradient")):
            value = float((logs or {}).get(key, 0.0))
            if not math.isfinite(value):
                raise RunError(
                    f"the {what} of step {state.global_step} is {value}, learning from "
                    f"{self._rows(state.global_step)}; {self._last()}; a lower "
                    "train.learning_rate or more train.warmup_steps may help"
                )

    def _rows(self, step: int) -> str:
        sources = list(dict.fromkeys(self._steps.rows[self._steps.plan[step - 1]]["source"]))
        more = f" and {len(sources) - SHOWN} more" if len(sources) > SHOWN else ""
        return ", ".join(sources[:SHOWN]) + more

    def _last(self) -> str:
        newest = self._checkpoints.newest()
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint"
