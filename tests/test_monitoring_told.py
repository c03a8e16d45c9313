"""What is told of a training: that it explodes, how far it is, trackers, and its curve."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pipeline
from rich.console import Console
from row_files import write_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers import make_talks, settings

from pipeline.chat import Chat
from pipeline.errors import RecipeError, RunError
from pipeline.run import Run
from pipeline.train import trackers
from pipeline.train.curve import draw_curve, plot, smooth
from pipeline.train.explosion import ExplosionWatch
from pipeline.train.progress import show_progress
from pipeline.train.stage import Watch, train
from pipeline.train.trainer import PackTrainer
from pipeline.tree import IGNORED


@pytest.fixture(scope="module")
def rows_file(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.arrow"
    write_rows(path, make_talks(chat))
    return path


def read_metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


class PowerCut(Exception):
    """Stands for whatever ends a process."""


def explosion(losses: list[float]) -> tuple[int, int] | None:
    """The step that tells of it, and the step it began with."""
    watch = ExplosionWatch()
    for step, loss in enumerate(losses, start=1):
        first = watch.add(step, loss)
        if first is not None:
            return step, first
    return None


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0] * 20 + [5.1] * 3, (23, 21)),
        ([2.0] * 20 + [4.9] * 30, None),
        ([2.0] * 20 + [9.0, 9.0, 2.0] * 9, None),
        ([2.0] * 3 + [6.0] * 3, (6, 4)),
        ([9.0] * 50, None),
        ([9.0 - step / 10 for step in range(80)] + [6.0] * 3, (83, 81)),
        ([2.0] * 20 + [1.0] + [4.6] * 3, None),
        ([12.0] + [2.0] * 12 + [5.1] * 3, (16, 14)),
        ([2.0] * 20 + [3.0 + step / 5 for step in range(40)], (34, 32)),
    ],
    ids=[
        *(
            "jump",
            "within",
            "single rows",
            "early",
            "never learnt",
            "above the best, not the first",
        ),
        *("one easy step", "begins high", "slowly"),
    ],
)
def test_a_loss_far_above_the_best_for_three_steps_has_exploded(
    losses: list[float], expected: tuple[int, int] | None
) -> None:
    assert explosion(losses) == expected


@pytest.mark.parametrize("cut_at", [None, 6], ids=["at once", "stopped in the middle of it"])
def test_an_explosion_stops_the_training_and_names_the_checkpoint_from_before(
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut_at: int | None,
) -> None:
    whole_loss = PackTrainer.sum_loss
    chosen = settings(steps=8, learning_rate=1e-4, save_steps=3, batch_rows=3)

    def sum_loss(self: PackTrainer, model: Any, pack: Any) -> torch.Tensor:
        if self.state.global_step == cut_at:
            raise PowerCut
        num_learnt = int((pack["labels"][:, 1:] != IGNORED).sum())
        return whole_loss(self, model, pack) + 9 * num_learnt * (self.state.global_step >= 4)

    monkeypatch.setattr(PackTrainer, "sum_loss", sum_loss)
    if cut_at is not None:
        with pytest.raises(PowerCut):
            train(chosen, tiny_base, rows_file, tmp_path)
        cut_at = None
    with pytest.raises(RunError) as caught:
        train(chosen, tiny_base, rows_file, tmp_path)
    told = str(caught.value)
    assert told.startswith("the loss explodes from step 5 on, to 1")
    assert " at step 7, learning from talk:" in told
    assert f"good checkpoint is {tmp_path}/checkpoints/checkpoint-3; a lower train.lear" in told
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def to_stderr() -> Iterator[logging.StreamHandler[Any]]:
    """The log as the command line sets it up, on the real stderr."""
    handler = logging.StreamHandler(sys.__stderr__)
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


def test_a_terminal_shows_one_bar_and_log_lines_stay_whole(
    to_stderr: logging.StreamHandler[Any],
) -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=90, color_system=None)
    with show_progress(console) as tell:
        tell(3, 12, "loss 1.234  0:00:09 left", False)
        logging.getLogger("pipeline").warning("a checkpoint is [bold]written[/bold]")
        tell(4, 12, "loss 1.200  0:00:08 left", True)
    drawn = screen.getvalue()
    assert "4/12 loss 1.200  0:00:08 left" in drawn
    assert "a checkpoint is [bold]written[/bold]\n" in drawn, "above the bar, as it is"
    assert to_stderr.stream is sys.__stderr__, "as before"


def test_without_a_terminal_there_are_lines_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    with show_progress(Console(file=StringIO()), log_every_s=1000) as tell:
        for step in range(1, 7):
            tell(step, 6, f"loss {step}.0", step == 4)
    assert caplog.messages == [f"step {step} of 6  loss {step}.0" for step in (1, 4, 6)]


def test_the_facts_of_a_step_are_told(
    tiny_base: Path, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    watch = Watch(rows_file, peak_tokens_per_s=1e6)
    train(settings(eval_steps=1), tiny_base, rows_file, tmp_path, None, watch)
    assert any(line.startswith("before training  held-out loss 5.") for line in caplog.messages)
    for step, metrics in enumerate(read_metrics(tmp_path), start=1):
        (line,) = [line for line in caplog.messages if line.startswith(f"step {step} of 2  ")]
        loss, held_out, left, supervised, tokens, mfu, memory = line.split("  ")[1:]
        assert loss == f"loss {metrics['loss']:.3f}"
        assert held_out == f"held-out {metrics['held_out_loss']:.3f}"
        assert re.fullmatch(r"0:00:\d\d left", left)
        assert supervised.endswith(" supervised tok/s")
        assert int(supervised.split()[0]) < int(tokens.removesuffix(" tok/s"))
        assert mfu == f"MFU {int(tokens.split()[0]) / 1e6:.1%}"
        assert re.fullmatch(r"peak \d\.\d GB", memory)


def test_no_peak_rate_no_mfu(
    tiny_base: Path, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    train(settings(steps=1), tiny_base, rows_file, tmp_path)
    assert any(line.startswith("step 1 of 1") for line in caplog.messages)
    assert "MFU" not in caplog.text


def test_tensorboard_is_told_every_step_once_though_the_training_was_stopped(
    tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(steps=4, save_steps=2, eval_steps=2, log_to=["tensorboard"])
    step = PackTrainer.training_step

    def training_step(self: PackTrainer, *inputs: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise PowerCut
        return step(self, *inputs)

    with monkeypatch.context() as patched:
        patched.setattr(PackTrainer, "training_step", training_step)
        with pytest.raises(PowerCut):
            train(chosen, tiny_base, rows_file, tmp_path, None, Watch(rows_file))
    train(chosen, tiny_base, rows_file, tmp_path, None, Watch(rows_file))
    told = EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    def points(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in told.Scalars(f"train/{name}")]

    lines = read_metrics(tmp_path)
    for name in ("loss", "held_out_loss", "learning_rate"):
        expected = [(line["step"], line[name]) for line in lines if name in line]
        assert points(name) == [(step, pytest.approx(value)) for step, value in expected]
    assert len(points("held_out_loss")) == 2
    assert [step for step, _ in points("tokens_per_s")] == [1, 2, 3, 4]
    assert all(
        0 < learnt < all_of_them
        for (_, learnt), (_, all_of_them) in zip(
            points("supervised_tokens_per_s"), points("tokens_per_s"), strict=True
        )
    )


def test_a_tracker_that_is_not_installed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(RecipeError) as caught:
        trackers.prepare_trackers(["tensorboard", "wandb"], tmp_path)
    assert str(caught.value) == (
        "train.log_to names wandb, not installed here: run pip install wandb, or "
        "pip install '.[log]' for all of them"
    )


def write_metrics(path: Path, num_steps: int) -> list[dict[str, float]]:
    lines = [
        {"step": step, "loss": 3 - step / 10, "learning_rate": 1e-4 * step} for step in range(1, 13)
    ][:num_steps]
    for line in lines[3::4]:
        line["held_out_loss"] = line["loss"] + 0.5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_the_curve_has_every_number_and_says_what_it_is(tmp_path: Path) -> None:
    lines = write_metrics(tmp_path / "metrics.jsonl", 12)
    losses, rates = plot(lines, "loss", "nats a token").axes
    each, smoothed, held_out = [list(zip(*line.get_data(), strict=True)) for line in losses.lines]
    assert each == [(line["step"], line["loss"]) for line in lines]
    assert [step for step, _ in smoothed] == list(range(1, 13))
    assert held_out == [(4, 3.1), (8, 2.7), (12, 2.3)]
    assert list(rates.lines[0].get_ydata()) == [line["learning_rate"] for line in lines]
    assert losses.get_xlabel() == "optimizer step"
    assert losses.get_ylabel() == "loss (nats a token)"
    assert "learning rate" in rates.get_ylabel()


def test_smoothing_keeps_a_constant_and_follows_a_change() -> None:
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    falling = smooth([3.0, 2.0, 1.0], weight=0.5)
    assert falling == pytest.approx([3.0, (2 * 2 + 3) / 3, (4 * 1 + 2 * 2 + 3) / 7])


def test_the_picture_is_a_png_and_there_is_none_of_a_single_step(tmp_path: Path) -> None:
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    write_metrics(metrics, 12)
    draw_curve(metrics, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    write_metrics(metrics, 1)
    draw_curve(metrics, picture)
    assert not picture.exists(), "nor one of an earlier training"


def test_a_picture_that_cannot_be_written_is_no_reason_to_lose_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_metrics(tmp_path / "metrics.jsonl", 12)
    picture = tmp_path / "loss.png"
    picture.mkdir()
    draw_curve(tmp_path / "metrics.jsonl", picture)
    assert caplog.messages == [f"{picture} cannot be written: Is a directory"]


@pytest.mark.slow
def test_the_command_measures_the_held_out_rows_and_draws(
    workplace: Path, tiny_base: Path, pipeline: Pipeline
) -> None:
    recipe = (workplace / "mine.yaml").read_text().replace("base: base", f"base: {tiny_base}")
    (workplace / "mine.yaml").write_text(recipe)
    assert pipeline("data", "mine.yaml").code == 0
    said = pipeline("train", "mine.yaml", "--set", "train.eval_steps=2")
    assert said.code == 0, said.err
    run = Run(Path("runs/mine"))
    assert ["held_out_loss" in line for line in read_metrics(run.folder)] == [False, True, True]
    assert run.loss_curve.read_bytes().startswith(b"\x89PNG")
