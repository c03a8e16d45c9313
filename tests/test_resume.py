"""A training that is stopped, however, ends as one that never was: same losses, same adapter."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pipeline
from datasets import Dataset
from row_files import write_rows
from trainers import FAST, make_talks, settings
from transformers import TrainerControl, TrainerState
from trl import SFTConfig

from pipeline import cli
from pipeline.chat import Chat
from pipeline.cli import program
from pipeline.errors import Interrupted, RunError
from pipeline.recipe import Train
from pipeline.run import Run
from pipeline.train import checkpoint, stage
from pipeline.train.checkpoint import NOTE, Checkpoints, Note, Saver, read_note
from pipeline.train.trainer import PackTrainer

SIX: dict[str, Any] = {
    "steps": 6,
    "save_steps": 2,
    "dropout": 0.2,
    "warmup_steps": 3,
    "schedule": "cosine",
}
Metrics = list[dict[str, float]]


@pytest.fixture(scope="module")
def rows_file(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.arrow"
    write_rows(path, make_talks(chat))
    return path


Fit = Callable[..., tuple[bytes, Metrics]]


@pytest.fixture(scope="module")
def fit(tiny_base: Path, rows_file: Path) -> Fit:
    """Trains in a folder; the adapter's bytes, and the metrics without what time they took."""

    def run(out: Path, inputs: dict[str, str] | None = None, **values: Any) -> Any:
        stage.train(settings(**SIX | values), tiny_base, rows_file, out, inputs)
        return (out / "adapter" / "adapter_model.safetensors").read_bytes(), read_metrics(out)

    return run


@pytest.fixture(scope="module")
def whole(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Metrics]:
    """What a training gives that nobody stops, nor saves."""
    return fit(tmp_path_factory.mktemp("whole"), save_steps=None)


def read_metrics(out: Path) -> Metrics:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def saved(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


class PowerCut(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], list[int]]:
    """Do something in the middle of a step, counted in this process; gives the steps begun."""
    done = PackTrainer.training_step

    def arrange(wanted: int, act: Callable[[], None]) -> list[int]:
        begun: list[int] = []

        def training_step(self: PackTrainer, *inputs: Any) -> torch.Tensor:
            begun.append(self.state.global_step + 1)
            if len(begun) == wanted:
                act()
            return done(self, *inputs)

        monkeypatch.setattr(PackTrainer, "training_step", training_step)
        return begun

    return arrange


def cut() -> None:
    raise PowerCut


def cut_after(fit: Fit, at_step: Any, out: Path, num_steps: int, **values: Any) -> None:
    at_step(num_steps + 1, cut)
    with pytest.raises(PowerCut):
        fit(out, **values)


@pytest.mark.parametrize(("num_steps", "kept"), [(1, []), (3, [2]), (4, [2, 4]), (5, [2, 4])])
def test_a_stopped_training_ends_as_one_that_never_was(
    fit: Fit, whole: Any, at_step: Any, tmp_path: Path, num_steps: int, kept: list[int]
) -> None:
    cut_after(fit, at_step, tmp_path, num_steps)
    if kept:
        assert saved(tmp_path) == [f"checkpoint-{step}" for step in kept]
    assert len(read_metrics(tmp_path)) == num_steps

    begun = at_step(0, cut)
    adapter, metrics = fit(tmp_path)
    assert begun == list(range(max(kept, default=0) + 1, 7))
    assert metrics == whole[1]
    assert adapter == whole[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "metrics.jsonl"]


def test_a_training_stopped_twice_too_and_the_newest_two_checkpoints_are_kept(
    fit: Fit, whole: Any, at_step: Any, tmp_path: Path
) -> None:
    cut_after(fit, at_step, tmp_path, 3, save_steps=1)
    assert saved(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    cut_after(fit, at_step, tmp_path, 2, save_steps=1)
    assert saved(tmp_path) == ["checkpoint-4", "checkpoint-5"]
    at_step(0, cut)
    assert fit(tmp_path) == whole


def test_what_lies_half_saved_is_not_gone_on_from_and_is_removed(
    fit: Fit, whole: Any, at_step: Any, tmp_path: Path
) -> None:
    cut_after(fit, at_step, tmp_path, 3)
    checkpoints = tmp_path / "checkpoints"
    without_note = checkpoints / "checkpoint-4"
    shutil.copytree(checkpoints / "checkpoint-2", without_note)
    (without_note / NOTE).unlink()
    broken_note = checkpoints / "checkpoint-5"
    shutil.copytree(checkpoints / "checkpoint-2", broken_note)
    (broken_note / NOTE).write_text('{"inputs": {', encoding="utf-8")
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-5.partial")
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-5.old")
    (tmp_path / "trainer.partial" / "checkpoint-4").mkdir(parents=True)

    begun = at_step(2, cut)
    with pytest.raises(PowerCut):
        fit(tmp_path, save_steps=None)
    assert begun == [3, 4]
    assert saved(tmp_path) == ["checkpoint-2"]
    assert not (tmp_path / "trainer.partial").exists()
    at_step(0, cut)
    assert fit(tmp_path) == whole


def test_a_save_that_fails_leaves_the_one_before_it(
    fit: Fit, whole: Any, at_step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = checkpoint.publish

    def full(temporary: Path, path: Path) -> None:
        if path.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        publish(temporary, path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "publish", full)
        with pytest.raises(RunError, match=r"checkpoint-4 cannot be written: No space left"):
            fit(tmp_path)
    assert saved(tmp_path) == ["checkpoint-2"]
    begun = at_step(0, cut)
    assert fit(tmp_path) == whole
    assert begun == [3, 4, 5, 6]


def test_a_disk_that_is_full_while_the_trainer_writes_is_one_sentence(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"^the checkpoint of step 2 cannot be written: Pytorch"):
        fit(tmp_path)


def test_metrics_after_the_checkpoint_are_written_again(
    fit: Fit, whole: Any, at_step: Any, tmp_path: Path
) -> None:
    cut_after(fit, at_step, tmp_path, 3)
    metrics = tmp_path / "metrics.jsonl"
    note = read_note(tmp_path / "checkpoints" / "checkpoint-2")
    assert note is not None
    assert len(metrics.read_bytes()[: note.metrics_bytes].splitlines()) == 2
    with metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    at_step(0, cut)
    assert fit(tmp_path) == whole


def test_metrics_that_were_deleted_are_no_reason_to_begin_again(
    fit: Fit, whole: Any, at_step: Any, tmp_path: Path
) -> None:
    cut_after(fit, at_step, tmp_path, 3)
    (tmp_path / "metrics.jsonl").unlink()
    at_step(0, cut)
    assert fit(tmp_path) == (whole[0], whole[1][2:])


@pytest.mark.parametrize(
    ("inputs", "values", "first"),
    [
        ({"rows": "a"}, {}, 3),
        ({"rows": "a"}, {"save_steps": None, "save_minutes": 3}, 3),
        ({"rows": "b"}, {}, 1),
        ({"rows": "a"}, {"learning_rate": 0.01}, 1),
        ({"rows": "a"}, {"resume": "never"}, 1),
    ],
    ids=["the same", "saved at other times", "other rows", "other settings", "never"],
)
def test_only_a_checkpoint_of_the_same_inputs_is_gone_on_from(
    fit: Fit,
    at_step: Any,
    tmp_path: Path,
    inputs: dict[str, str],
    values: dict[str, Any],
    first: int,
) -> None:
    cut_after(fit, at_step, tmp_path, 3, inputs={"rows": "a"})
    begun = at_step(1, cut)
    with pytest.raises(PowerCut):
        fit(tmp_path, inputs, **values)
    assert begun == [first]
    assert saved(tmp_path) == (["checkpoint-2"] if first == 3 else [])
    assert len(read_metrics(tmp_path)) == first - 1


def test_the_time_before_the_stop_counts(
    fit: Fit, at_step: Any, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    cut_after(fit, at_step, tmp_path, 3)
    path = tmp_path / "checkpoints" / "checkpoint-2" / NOTE
    note = json.loads(path.read_text())
    assert 0 < note["seconds"] < 1000
    path.write_text(json.dumps(note | {"seconds": 1000.0}))
    at_step(0, cut)
    measured = stage.train(settings(**SIX), tiny_base, rows_file, tmp_path)
    assert measured["seconds"] > 1000
    assert measured["steps"] == 6


def test_ctrl_c_saves_and_says_where_it_goes_on(
    fit: Fit, whole: Any, at_step: Any, tmp_path: Path
) -> None:
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match=r"^interrupted; the run goes on from step 3 when st"):
        fit(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert saved(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    begun = at_step(0, cut)
    assert fit(tmp_path) == whole
    assert begun == [4, 5, 6]


def test_a_second_ctrl_c_stops_at_once(fit: Fit, at_step: Any, tmp_path: Path) -> None:

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(4, twice)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path)
    assert saved(tmp_path) == ["checkpoint-2"]


def test_ctrl_c_in_the_last_step_lets_it_end(
    fit: Fit, whole: Any, at_step: Any, tmp_path: Path
) -> None:
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert fit(tmp_path) == whole


def test_the_command_ends_with_130_and_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        raise Interrupted("interrupted; the run goes on")

    monkeypatch.setattr(program, "app", stop)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted; the run goes on\n"


def test_a_loss_that_is_no_number_stops_with_its_rows_and_the_last_checkpoint(
    fit: Fit, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_loss = PackTrainer.sum_loss

    def sum_loss(self: PackTrainer, model: Any, pack: Any) -> torch.Tensor:
        loss = whole_loss(self, model, pack)
        return loss * float("nan") if self.state.global_step == 4 else loss

    monkeypatch.setattr(PackTrainer, "sum_loss", sum_loss)
    with pytest.raises(RunError) as caught:
        fit(tmp_path, batch_rows=8)
    plan = stage.read_steps(rows_file, settings(**SIX, batch_rows=8), 1).plan
    sources = list(dict.fromkeys(Dataset.from_file(str(rows_file))[plan[4]]["source"]))
    assert len(sources) > 3, "or nothing is left out of the sentence"
    assert str(caught.value) == (
        f"the loss of step 5 is nan, learning from {', '.join(sources[:3])} and "
        f"{len(sources) - 3} more; the last good checkpoint is "
        f"{tmp_path}/checkpoints/checkpoint-4; a lower train.learning_rate or more "
        "train.warmup_steps may help"
    )
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_learning_rate_that_explodes_stops_the_training(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^the (loss|gradient) of step \d is (nan|inf), learning"):
        fit(tmp_path, learning_rate=1e30, dtype="float32", warmup_steps=0, save_steps=None)
    assert not (tmp_path / "adapter").exists()


def test_several_gpus_in_one_process_are_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SFTConfig, "n_gpu", 2)
    with pytest.raises(RunError, match=r"^there are 2 GPUs.* set CUDA_VISIBLE_DEVICES=0"):
        stage.to_arguments(settings(), tmp_path)


class Processes:
    """As many accelerators as `said` is long: the first is us, and all are asked at once."""

    device = torch.device("cpu")

    def __init__(self, *said: list[int]) -> None:
        self.num_processes = len(said) + 1
        self._others = torch.tensor(said, dtype=torch.int32)

    def reduce(self, own: torch.Tensor) -> torch.Tensor:
        return own + self._others.sum(0)


@pytest.mark.parametrize(
    ("minutes", "others", "step", "saves", "stops"),
    [
        (10.0, [], 1, False, False),
        (1e-9, [], 1, True, False),
        (1e-9, [], 5, False, False),
        (10.0, [[0, 1]], 1, True, False),
        (10.0, [[0, 0], [1, 0]], 1, True, True),
        (10.0, [[0, 0], [0, 0]], 1, False, False),
    ],
    ids=["not yet", "in time", "last step", "another's clock", "another's Ctrl-C", "nobody"],
)
def test_a_checkpoint_is_due_by_time_or_when_another_process_says_so(
    tmp_path: Path, minutes: float, others: list[list[int]], step: int, saves: bool, stops: bool
) -> None:
    chosen = Train.model_validate(FAST | {"steps": 5, "save_minutes": minutes})
    checkpoints = Checkpoints(tmp_path, {})
    saver = Saver(chosen, Processes(*others), checkpoints, tmp_path / "metrics.jsonl")
    control = TrainerControl()
    state = TrainerState(global_step=step, max_steps=5)
    saver.on_step_end(stage.to_arguments(chosen, tmp_path), state, control)
    assert control.should_save is saves
    assert control.should_training_stop is stops
    assert saver.is_stopped is stops


def test_a_checkpoint_of_another_build_of_torch_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(settings(), Processes(), Checkpoints(tmp_path, {}), tmp_path / "metrics.jsonl")
    caplog.set_level("INFO")
    for build, is_told in ((torch.__version__, False), ("0.0", True)):
        caplog.clear()
        layout = {"micro_tokens": FAST["micro_tokens"], "checkpointing": FAST["checkpointing"]}
        made_with = checkpoint.describe_torch() | layout | {"torch_build": build, "processes": 1}
        saver.go_on_from(tmp_path / "checkpoint-2", Note({}, 0, 5.0, made_with))
        assert "going on from step 2" in caplog.text
        assert ("the last bits will differ" in caplog.text) is is_told


KILLED = """
import json, os, signal, sys
from pathlib import Path
from pipeline.recipe import Train
from pipeline.train import checkpoint, stage
from pipeline.train.trainer import PackTrainer

where, values, base, rows, out = sys.argv[1:]
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
step, publish = PackTrainer.training_step, checkpoint.publish
def training_step(self, *inputs):
    if where == "step" and self.state.global_step == 3:
        kill()
    return step(self, *inputs)
def publish_or_die(temporary, path):
    if where == "save" and path.name == "checkpoint-4":
        kill()
    publish(temporary, path)
PackTrainer.training_step = training_step
checkpoint.publish = publish_or_die
if where == "end":
    stage.save = kill
stage.train(Train.model_validate_json(values), Path(base), Path(rows), Path(out))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "first"), [("step", 3), ("save", 3), ("end", 5)])
def test_a_killed_process_is_no_loss(
    fit: Fit,
    whole: Any,
    at_step: Any,
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    where: str,
    first: int,
) -> None:
    values = settings(**SIX).model_dump_json()
    paths = (str(tiny_base), str(rows_file), str(tmp_path))
    died = subprocess.run([sys.executable, "-c", KILLED, where, values, *paths], check=False)
    assert died.returncode == -signal.SIGKILL
    begun = at_step(0, cut)
    assert fit(tmp_path) == whole
    assert begun == list(range(first, 7))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "metrics.jsonl"]


def test_half_a_removed_checkpoint_is_none(
    fit: Fit, at_step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_after(fit, at_step, tmp_path, 3, inputs={"rows": "a"})
    made_from = read_note(tmp_path / "checkpoints" / "checkpoint-2")
    assert made_from is not None
    checkpoints = Checkpoints(tmp_path / "checkpoints", made_from.inputs)
    assert checkpoints.newest() == tmp_path / "checkpoints" / "checkpoint-2"

    def die(path: Path, **_: Any) -> None:
        raise PowerCut

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(PowerCut):
        checkpoints.clear()
    assert checkpoints.newest() is None


INTERRUPTED = """
import os, signal, sys
from pipeline import cli
from pipeline.cli import program
from pipeline.train.trainer import PackTrainer

signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run
step = PackTrainer.training_step
def training_step(self, *inputs):
    if self.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, *inputs)
PackTrainer.training_step = training_step
sys.argv = ["pipeline", "train", "mine.yaml"]
cli.main()
"""


@pytest.mark.slow
def test_the_command_goes_on_after_ctrl_c(
    workplace: Path, tiny_base: Path, pipeline: Pipeline
) -> None:
    recipe = (workplace / "mine.yaml").read_text().replace("steps: 3", "steps: 5, dropout: 0.1")
    for name in ("mine", "other"):
        (workplace / f"{name}.yaml").write_text(recipe.replace("base: base", f"base: {tiny_base}"))
        assert pipeline("data", f"{name}.yaml").code == 0
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    program = [sys.executable, "-c", INTERRUPTED]
    died = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert died.returncode == 130
    told = died.stderr.splitlines()
    assert told[-1] == "interrupted; the run goes on from step 3 when started again"
    assert "Traceback" not in died.stderr
    mine, other = Run(Path("runs/mine")), Run(Path("runs/other"))
    assert [path.name for path in mine.checkpoints.iterdir()] == ["checkpoint-3"]

    for name in ("mine", "other"):
        assert pipeline("train", f"{name}.yaml").code == 0
    adapters = [run.adapter / "adapter_model.safetensors" for run in (mine, other)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert read_metrics(mine.folder) == read_metrics(other.folder)
    assert not mine.checkpoints.exists()
    assert mine.facts()["torch_threads"] == torch.get_num_threads()
    again = pipeline("train", "mine.yaml", "--set", "train.save_steps=1")
    assert "nothing to do" in again.out, "when it is saved is no reason to train again"


TWO = """
import os, signal, sys
from pathlib import Path
from pipeline.recipe import Train
from pipeline.train import stage
from pipeline.train.trainer import PackTrainer

kind, values, base, rows, out = sys.argv[1:]
step = PackTrainer.training_step
def training_step(self, *inputs):
    if self.state.global_step == 3 and kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if self.state.global_step == 2 and kind == "stopped" and self.args.process_index == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, *inputs)
PackTrainer.training_step = training_step
signal.signal(signal.SIGINT, signal.default_int_handler)
stage.train(Train.model_validate_json(values), Path(base), Path(rows), Path(out))
"""


@pytest.mark.slow
def test_two_processes_go_on_together(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TWO)

    def launch(kind: str, out: Path) -> tuple[int, str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        values = settings(**SIX, micro_tokens=60).model_dump_json()
        done = subprocess.run(
            [
                sys.executable,
                *launcher,
                str(script),
                kind,
                values,
                str(tiny_base),
                str(rows_file),
                str(out),
            ],
            env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        return done.returncode, done.stderr

    def results(out: Path) -> tuple[bytes, Metrics]:
        return (out / "adapter" / "adapter_model.safetensors").read_bytes(), read_metrics(out)

    assert launch("whole", tmp_path / "whole")[0] == 0
    for kind, kept in (
        ("killed", ["checkpoint-2"]),
        ("stopped", ["checkpoint-2", "checkpoint-3"]),
    ):
        code, told = launch(kind, tmp_path / kind)
        assert code != 0
        assert saved(tmp_path / kind) == kept, told[-3000:]
        code, told = launch("whole", tmp_path / kind)
        assert code == 0, told[-3000:]
        assert results(tmp_path / kind) == results(tmp_path / "whole")
