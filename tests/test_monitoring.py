"""The loss on held-out rows, and the weights that are kept for it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from row_files import write_rows
from safetensors.torch import load_file, save_file
from torch.nn import functional
from trainers import make_talks, settings
from transformers import AutoModelForCausalLM

from pipeline import cli
from pipeline.chat import Chat
from pipeline.data.rows import Row
from pipeline.errors import RunError
from pipeline.train import held_out, stage
from pipeline.train.stage import Watch
from pipeline.train.trainer import PackTrainer

# Far too fast on few rows: what is held out is forgotten after some steps.
HASTY: dict[str, Any] = {
    "dtype": "float32",
    "steps": 8,
    "learning_rate": 0.1,
    "batch_rows": 3,
    "dropout": 0.2,
    "eval_steps": 2,
    "save_steps": 3,
}


@pytest.fixture(scope="module")
def rows(chat: Chat) -> list[Row]:
    return make_talks(chat)


@pytest.fixture(scope="module")
def files(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows to train on, and others that are held out."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "train.arrow", rows[:6])
    write_rows(folder / "eval.arrow", rows[6:])
    return folder / "train.arrow", folder / "eval.arrow"


Fit = Callable[..., tuple[dict[str, torch.Tensor], list[dict[str, float]]]]


@pytest.fixture(scope="module")
def fit(tiny_base: Path, files: tuple[Path, Path]) -> Fit:
    """Trains in a folder; the adapter's weights, and the metrics without what time they took."""

    def run(out: Path, **values: Any) -> Any:
        chosen = settings(**HASTY | values)
        stage.train(chosen, tiny_base, files[0], out, None, Watch(files[1]))
        return read_weights(out), read_metrics(out)

    return run


@pytest.fixture(scope="module")
def whole(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a training gives that nobody stops, nor saves."""
    return fit(tmp_path_factory.mktemp("whole"), save_steps=None)


def read_weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(out / "adapter" / "adapter_model.safetensors"))


def read_metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def measured(metrics: list[dict[str, float]]) -> dict[int, float]:
    return {int(x["step"]): x["held_out_loss"] for x in metrics if "held_out_loss" in x}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def loss_by_hand(base: Path, adapter: Path, rows: list[Row]) -> float:
    """The mean loss of the completions' tokens, each row by itself through PEFT's model."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).eval()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        size = len(row.completion_ids)
        with torch.no_grad():
            logits = model(ids).logits[0, -size - 1 : -1]
        total += float(functional.cross_entropy(logits, ids[0, -size:], reduction="sum"))
        count += size
    return total / count


@pytest.mark.parametrize("packing", ["tree", "none"])
def test_the_held_out_loss_is_that_of_the_rows_alone_and_the_adapter_has_the_least(
    fit: Fit, tiny_base: Path, rows: list[Row], tmp_path: Path, packing: str
) -> None:
    _, metrics = fit(tmp_path, packing=packing, steps=5)
    losses = measured(metrics)
    assert list(losses) == [2, 4, 5], "every second step, and the last"
    expected = loss_by_hand(tiny_base, tmp_path / "adapter", rows[6:])
    assert min(losses.values()) == pytest.approx(expected, rel=1e-5)


def test_measuring_changes_no_bit_of_the_training(fit: Fit, whole: Any, tmp_path: Path) -> None:
    _, metrics = fit(tmp_path, eval_steps=None)
    without = [{k: v for k, v in line.items() if k != "held_out_loss"} for line in whole[1]]
    assert without != whole[1]
    assert metrics == without


def test_what_is_kept_is_the_training_up_to_the_best_step(
    fit: Fit, whole: Any, tmp_path: Path
) -> None:
    losses = measured(whole[1])
    best = min(losses, key=lambda step: losses[step])
    assert best < 8, "or nothing would have to be put back"
    assert same(fit(tmp_path, steps=best, eval_steps=None)[0], whole[0])


def test_patience_ends_a_training_that_gets_no_better(fit: Fit, whole: Any, tmp_path: Path) -> None:
    losses = measured(whole[1])
    best = min(losses, key=lambda step: losses[step])
    assert best <= 4, "or there is no room for two worse ones and a step that is left out"
    weights, metrics = fit(tmp_path, patience=1, save_steps=1)
    assert metrics == whole[1][: best + 2]
    assert same(weights, whole[0])


def test_ctrl_c_in_the_step_that_patience_ends_with_lets_it_end(
    fit: Fit, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the training would go on from there, one step further than if left alone."""
    losses = measured(whole[1])
    last = min(losses, key=lambda step: losses[step]) + 2
    step = PackTrainer.training_step

    def training_step(self: PackTrainer, *inputs: Any) -> torch.Tensor:
        if self.state.global_step == last - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *inputs)

    monkeypatch.setattr(PackTrainer, "training_step", training_step)
    assert same(fit(tmp_path, patience=1)[0], whole[0])


def test_of_many_held_out_rows_some_are_spread_evenly(
    tiny_base: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "MAX_ROWS", 3)
    steps = stage.read_steps(files[0], settings(batch_rows=2), 1)
    assert held_out.read_held_out(files[1], steps).plan == [[0, 2], [4]]
    monkeypatch.setattr(held_out, "MAX_ROWS", 100)
    assert held_out.read_held_out(files[1], steps).plan == [[0, 1], [2, 3], [4, 5]]


def test_no_held_out_rows_are_one_sentence(fit: Fit, files: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "none.arrow", [])
    steps = stage.read_steps(files[0], settings(), 1)
    with pytest.raises(RunError, match=r"none\.arrow holds no rows.* set data\.eval"):
        held_out.read_held_out(tmp_path / "none.arrow", steps)


class PowerCut(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("num_steps", [4, 7])
def test_a_stopped_training_keeps_the_same_weights(
    fit: Fit, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    step = PackTrainer.training_step

    def training_step(self: PackTrainer, *inputs: Any) -> torch.Tensor:
        if self.state.global_step == num_steps:
            raise PowerCut
        return step(self, *inputs)

    with monkeypatch.context() as patched:
        patched.setattr(PackTrainer, "training_step", training_step)
        with pytest.raises(PowerCut):
            fit(tmp_path)
    assert not (tmp_path / "adapter").exists()
    weights, metrics = fit(tmp_path)
    assert metrics == whole[1]
    assert same(weights, whole[0])


def test_a_checkpoint_has_the_best_weights_of_its_own_time(
    fit: Fit, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever came after it, on a machine that computes otherwise, is not gone on with."""
    step = PackTrainer.training_step

    def training_step(self: PackTrainer, *inputs: Any) -> torch.Tensor:
        if self.state.global_step == 5:
            raise PowerCut
        return step(self, *inputs)

    with monkeypatch.context() as patched:
        patched.setattr(PackTrainer, "training_step", training_step)
        with pytest.raises(PowerCut):
            fit(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    note = json.loads((checkpoint / held_out.NOTE).read_text())
    assert note == {"loss": measured(whole[1])[2], "step": 2, "num_worse": 0}

    # From here on nothing is better: what was set aside in the checkpoint is the result.
    (checkpoint / held_out.NOTE).write_text(json.dumps(note | {"loss": 0.0}))
    path = checkpoint / held_out.WEIGHTS
    save_file({name: torch.full_like(w, 0.5) for name, w in load_file(path).items()}, path)
    weights, _ = fit(tmp_path)
    assert all((w == 0.5).all() for w in weights.values())


def test_a_held_out_loss_that_is_no_number_stops_the_training(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(self: held_out.HeldOut) -> float:
        return float("nan")

    monkeypatch.setattr(held_out.HeldOut, "measure", measure)
    with pytest.raises(RunError, match=r"^the loss on held-out rows after step 2 is nan; a lower"):
        fit(tmp_path)


TWO = """
import sys
from pathlib import Path
from pipeline.recipe import Train
from pipeline.train import stage

values, base, rows, held_out, out = sys.argv[1:]
settings, watch = Train.model_validate_json(values), stage.Watch(Path(held_out))
stage.train(settings, Path(base), Path(rows), Path(out), None, watch)
"""


@pytest.mark.slow
def test_two_processes_measure_and_keep_the_same(
    fit: Fit, tiny_base: Path, rows: list[Row], files: tuple[Path, Path], tmp_path: Path
) -> None:
    chosen = HASTY | {"dropout": 0.0, "patience": 1}
    _, metrics = fit(tmp_path / "one", **chosen)
    (tmp_path / "script.py").write_text(TWO)
    paths = (tiny_base, *files, tmp_path / "two")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"),
            *("2", str(tmp_path / "script.py"), settings(**chosen).model_dump_json()),
            *map(str, paths),
        ],
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    both = measured(read_metrics(tmp_path / "two"))
    assert both == pytest.approx(measured(metrics), rel=1e-4)
    kept = loss_by_hand(tiny_base, tmp_path / "two" / "adapter", rows[6:])
    assert kept == pytest.approx(min(both.values()), rel=1e-5)
