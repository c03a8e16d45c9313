"""One run on one machine: what it would hold, and whether that fits."""

import math
from dataclasses import dataclass, replace
from typing import Any

from pipeline.plan.machine import Machine
from pipeline.plan.memory import Load, hold, shard
from pipeline.plan.rows import Rows
from pipeline.plan.shape import Shape
from pipeline.recipe import Train


@dataclass(frozen=True)
class Job:
    """Settings, a base, rows and a machine; `settle` makes numbers of the settings' auto."""

    settings: Train
    shape: Shape
    rows: Rows
    machine: Machine
    sharding: str = "none"
    """fsdp2: devices hold a part of the weights each, instead of all."""

    def change(self, **values: Any) -> "Job":
        """The same with other settings; ValueError where they do not go together."""
        settings = Train.model_validate(self.settings.model_dump() | values)
        return replace(self, settings=settings)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.settings.steps:
            return self.settings.steps
        rows = max(1, round((self.settings.epochs or 1) * self.num_items))
        return math.ceil(rows / self.settings.batch_rows)

    @property
    def num_items(self) -> int:
        """What a step has batch_rows of: rows, pairs, or questions with all their replies."""
        grpo = self.settings.objective == "grpo"
        return max(1, self.rows.count // self.settings.grpo.replies) if grpo else self.rows.count

    @property
    def step_tokens(self) -> float:
        """Tokens of a step through the model, on average, on all devices together."""
        return self.settings.batch_rows * self.rows.shared / max(1, self.num_items)

    @property
    def largest_step(self) -> int:
        """Of a run's steps, about: two deviations above the average, if rows fall at random."""
        rows = self.rows
        spread = math.sqrt(max(0.0, rows.mean_square - rows.mean**2))
        spread *= rows.shared / max(1, rows.tokens)
        largest = self.step_tokens + 2 * spread * math.sqrt(self.settings.batch_rows)
        return max(rows.longest, math.ceil(min(largest, self.settings.batch_rows * rows.longest)))

    def held_tokens(self, micro_tokens: int) -> int:
        """Tokens in memory at once: a micro-batch's, but at least the longest row and at most a
        step."""
        return max(self.rows.longest, min(micro_tokens, self.largest_step))

    def memory(self, tokens: int) -> dict[str, int]:
        """Bytes on each device with so many tokens at once, by what they hold, and their `peak`."""
        supervised = round(tokens * min(1.0, self.rows.supervised / max(1, self.rows.shared)))
        load = Load(tokens, supervised, self.machine.is_cpu, self.machine.devices)
        lines = hold(self.settings, self.shape, load)
        if self.sharding == "fsdp2":
            lines = shard(lines, self.shape, self.settings, self.machine.devices)
        return lines | {"peak": sum(lines.values())}

    def fits(self, tokens: int, share: float = 1.0) -> bool:
        """Whether so many tokens at once do, into a share of the machine's memory."""
        return self.memory(tokens)["peak"] <= share * self.machine.memory_bytes

    def most_tokens(self, limit: int, share: float = 1.0) -> int:
        """The most tokens up to `limit` that fit at once; 0 if not even one does."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(middle, share) else (low, middle - 1)
        return low
