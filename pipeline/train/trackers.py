"""Experiment trackers beside metrics.jsonl: transformers' own, kept to the run's folder."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from pipeline.errors import RecipeError


def prepare_trackers(names: Sequence[str], out: Path) -> None:
    """Keep what they write below the run's folder `out`; call it before trl, which imports trackio.

    Nothing leaves the machine unless the user's own environment says so: W&B is offline without
    WANDB_API_KEY or WANDB_MODE, and trackio is local without TRACKIO_SPACE_ID. Raises RecipeError
    if one is not installed.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"train.log_to names {' and '.join(missing)}, not installed here: "
            f"run pip install {' '.join(missing)}, or pip install '.[log]' for all of them"
        )
    folder = out.resolve()
    wanted = {"TRACKIO_DIR": str(folder / "trackio")} if "trackio" in names else {}
    if "wandb" in names:
        wanted |= {
            "WANDB_DIR": str(folder),
            "WANDB_PROJECT": folder.name,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",  # it would take the terminal from the bar
        }
        if "WANDB_API_KEY" not in os.environ:
            wanted["WANDB_MODE"] = "offline"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def make_trackers(
    names: Sequence[str], out: Path, arguments: TrainingArguments
) -> list[TrainerCallback]:
    """Callbacks that tell each of every step, in a project with the run's name."""
    arguments.project = arguments.run_name = out.resolve().name
    return [_TensorBoard(out / name) if name == "tensorboard" else _KINDS[name]() for name in names]


class _TensorBoard(TensorBoardCallback):
    """Writes into a folder of ours, and hides what an earlier attempt wrote of later steps."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Begin where the training does."""
        if state.is_world_process_zero:
            first = state.global_step + 1
            self.tb_writer = self._SummaryWriter(str(self._folder), purge_step=first)
        super().on_train_begin(args, state, control, **given)


_KINDS = {"trackio": TrackioCallback, "wandb": WandbCallback}
