"""What is told of a run's steps: metrics.jsonl, and their pace for whoever watches."""

import json
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.train.checkpoint import Note
from pipeline.train.memory import peak_bytes
from pipeline.train.progress import Tell

RECENT = 20  # steps a pace is measured over: the first ones are slower


class Counts(Protocol):
    """What a trainer counts from its start, of all processes together."""

    num_supervised_tokens: int
    num_tokens: int
    """Through the model: after sharing, without padding."""
    num_row_tokens: int
    """Without sharing."""


COUNTS = ("num_supervised_tokens", "num_tokens", "num_row_tokens")


@dataclass(frozen=True)
class Pace:
    """How fast the last few steps were, held-out rows left out."""

    supervised_tokens_per_s: float
    tokens_per_s: float
    seconds_left: float


class StepLog(TrainerCallback):
    """Writes metrics.jsonl, and tells each step's facts.

    It must be called before any callback that takes its time, and before trackers: these are told
    of the pace, too.
    """

    def __init__(
        self, path: Path, counts: Counts, tell: Tell, peak_tokens_per_s: float | None = None
    ) -> None:
        self._path = path
        self._counts = counts
        self._tell = tell
        self._num_bytes = 0
        self._peak_tokens_per_s = peak_tokens_per_s
        self._before = dict.fromkeys(COUNTS, 0)
        self._began = self._ended = 0.0
        self._held_out: float | None = None
        self._recent: deque[dict[str, float]] = deque(maxlen=RECENT)

    def go_on_from(self, note: Note) -> None:
        """Keep what the file held when a checkpoint was made; without one it begins empty."""
        self._num_bytes = note.metrics_bytes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take back what came after the checkpoint, and set the clock to zero."""
        if state.is_world_process_zero:
            with self._path.open("ab") as file:
                file.truncate(min(file.tell(), self._num_bytes))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The first step begins once every callback is ready."""
        self._began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """What other callbacks do from here on is not the step's time."""
        self._ended = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """One object a step, of all processes together."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        counts = {key: getattr(self._counts, key) for key in COUNTS}
        line = {
            "step": state.global_step,
            **{key: float(value) for key, value in logs.items() if key != "epoch"},
            **{key: counts[key] - self._before[key] for key in COUNTS},
            "seconds": round(self._ended - self._began, 4),
        }
        self._before = counts
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._recent.append(line)
        pace = self._pace(state.max_steps - state.global_step)
        logs["supervised_tokens_per_s"] = pace.supervised_tokens_per_s
        logs["tokens_per_s"] = pace.tokens_per_s
        facts = self._facts(logs, pace)
        self._tell(state.global_step, state.max_steps, facts, "held_out_loss" in logs)
        self._began = time.monotonic()

    def _pace(self, num_left: int) -> Pace:
        seconds, supervised, tokens = (
            sum(line[key] for line in self._recent)
            for key in ("seconds", "num_supervised_tokens", "num_tokens")
        )
        return Pace(supervised / seconds, tokens / seconds, seconds / len(self._recent) * num_left)

    def _facts(self, logs: dict[str, float], pace: Pace) -> str:
        """The likeliest to be looked for come first: a narrow terminal cuts the end off."""
        facts = [f"reward {logs['reward']:.2f}"] if "reward" in logs else []
        facts.append(f"loss {logs['loss']:.3f}")
        self._held_out = logs.get("held_out_loss", self._held_out)
        if self._held_out is not None:
            facts.append(f"held-out {self._held_out:.3f}")
        facts.append(f"{_clock(pace.seconds_left)} left")
        facts.append(f"{pace.supervised_tokens_per_s:.0f} supervised tok/s")
        facts.append(f"{pace.tokens_per_s:.0f} tok/s")
        if self._peak_tokens_per_s is not None:
            facts.append(f"MFU {pace.tokens_per_s / self._peak_tokens_per_s:.1%}")
        facts.append(f"peak {peak_bytes() / 1e9:.1f} GB")
        return "  ".join(facts)


def _clock(seconds: float) -> str:
    """As 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
