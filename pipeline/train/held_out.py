"""The loss on held-out rows: measured while a training runs, and the weights with the least of it.

Measuring changes nothing of the training: no gradients, no dropout, no draw of random numbers.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import RunError
from pipeline.recipe import Train
from pipeline.run import write_json
from pipeline.train.steps import Steps
from pipeline.train.trainer import PackTrainer

log = logging.getLogger(__name__)
MAX_ROWS = 512
"""Of more rows as many are measured, spread evenly: the mean is then within a few per cent."""
WEIGHTS = "best.safetensors"
NOTE = "held_out.json"


@dataclass
class Best:
    """The least loss so far, in the unit of the training's own."""

    loss: float = math.inf
    step: int = 0
    num_worse: int = 0
    """Measurements since that were no better."""


def read_held_out(path: Path | None, steps: Steps) -> Steps:
    """Held-out rows as steps of the same kind and size as those trained on, each row once.

    At most `MAX_ROWS` of them, spread evenly over the file. Raises RunError if it holds none.
    """
    rows = Dataset.from_file(str(path)) if path is not None else Dataset.from_dict({})
    if not len(rows):
        raise RunError(f"{path} holds no rows, and train.eval_steps needs some: set data.eval")
    num_rows = min(len(rows), MAX_ROWS)
    places = [index * len(rows) // num_rows for index in range(num_rows)]
    size = max(map(len, steps.plan))
    plan = [places[start : start + size] for start in range(0, num_rows, size)]
    return replace(steps, rows=rows.select_columns(steps.rows.column_names), plan=plan)


class HeldOut(TrainerCallback):
    """Measures every `eval_steps` steps and at the end; keeps the best weights; ends a training.

    The best weights lie in the trainer's scratch folder, and a copy in every checkpoint: a training
    that goes on from there knows nothing of what came after it.
    """

    def __init__(self, trainer: PackTrainer, settings: Train, rows: Path | None) -> None:
        if trainer.is_deepspeed_enabled:
            raise RunError(
                "train.eval_steps puts the best weights back, and DeepSpeed's are not at hand; "
                "remove it, or launch with recipes/accelerate/fsdp2.yaml"
            )
        self._trainer = trainer
        self._every = settings.eval_steps or 1
        self._patience = settings.patience or math.inf
        self._steps = read_held_out(rows, trainer.data_collator)
        self._best = Best()
        self._weights = Path(trainer.args.output_dir) / WEIGHTS

    def go_on_from(self, checkpoint: Path) -> None:
        """Take over the best weights as of a checkpoint, if there were any."""
        if not (checkpoint / NOTE).is_file():
            return
        self._best = Best(**json.loads((checkpoint / NOTE).read_text(encoding="utf-8")))
        if self._trainer.is_world_process_zero():
            self._weights.parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint / WEIGHTS, self._weights)

    def measure(self) -> float:
        """The mean over the rows' supervised tokens, or over pairs; of all processes together."""
        trainer, steps = self._trainer, self._steps
        total = torch.zeros((), device=trainer.accelerator.device)
        count = 0
        trainer.model.eval()
        try:
            for step in range(len(steps.plan)):
                share = step * steps.num_processes + trainer.args.process_index
                loss, size = trainer.measure(steps([{"share": share}]))
                total += loss
                count += size
        finally:
            trainer.model.train()
        return float(trainer.accelerator.reduce(total)) / count

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Say what there is to gain."""
        if not state.global_step:
            log.info("before training  held-out loss %.3f", self.measure())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure, if it is time; keep the weights, or count towards the end."""
        step = state.global_step
        if step % self._every and step < state.max_steps:
            return
        loss = self.measure()
        if not math.isfinite(loss):
            raise RunError(
                f"the loss on held-out rows after step {step} is {loss}; "
                "a lower train.learning_rate may help"
            )
        self._trainer._metrics["train"]["held_out_loss"].append(loss)  # TRL logs it with the step
        if loss < self._best.loss:
            self._best = Best(loss, step)
            self._keep()
            return
        self._best.num_worse += 1
        if self._best.num_worse >= self._patience:
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Put the best weights so far into the checkpoint, which has not got its name yet."""
        if self._best.step and state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            try:
                shutil.copyfile(self._weights, checkpoint / WEIGHTS)
            except OSError as error:
                what = f"the checkpoint of step {state.global_step} cannot be written"
                raise RunError(f"{what}: {error.strerror}") from error
            write_json(checkpoint / NOTE, asdict(self._best))

    def restore(self) -> Best:
        """Give the model the best weights again; call it in every process."""
        self._trainer.accelerator.wait_for_everyone()
        if self._best.step != self._trainer.state.global_step:
            with safe_open(self._weights, "pt") as best, torch.no_grad():
                for name, parameter in self._parameters():
                    parameter.copy_(_spread(best.get_tensor(name), parameter))
        return self._best

    def _keep(self) -> None:
        is_main = self._trainer.is_world_process_zero()
        weights = {}
        for name, parameter in self._parameters():
            whole = _gather(parameter.detach())
            if is_main:
                weights[name] = whole.cpu().contiguous()
        if not is_main:
            return
        try:
            self._weights.parent.mkdir(exist_ok=True)
            save_file(weights, self._weights)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self._weights} cannot be written: {error}") from error

    def _parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self._trainer.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _spread(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The other way round."""
    whole = whole.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements)
    return whole
