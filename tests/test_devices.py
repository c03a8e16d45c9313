"""Several processes, one a device: told by the first one, sharded, gathered; compiled layers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import Pipeline, conversation
from peft import PeftModel
from row_files import write_rows
from torch._dynamo.utils import counters
from trainers import build_trainer, fill_adapter, make_talks, settings
from transformers import AutoModelForCausalLM

from pipeline.chat import Chat
from pipeline.errors import RunError
from pipeline.train.attention import BLOCK, dense_mask, fill_block
from pipeline.train.compiled import compile_layers
from pipeline.train.devices import refuse_unfit
from pipeline.tree import IGNORED

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "recipes" / "accelerate").iterdir())


@pytest.fixture(scope="module")
def rows_file(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.arrow"
    write_rows(path, make_talks(chat))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_knows_every_key_of_its_configurations(path: Path) -> None:
    config = load_config_from_file(str(path))  # ValueError for a key of the first level
    known = {option.dest for option in launch_command_parser()._actions}
    assert config.num_processes % config.num_machines == 0
    assert config.fsdp_config.keys() <= known
    assert config.deepspeed_config.keys() <= known
    command = path.read_text("utf-8").partition("#   accelerate launch ")[2].partition("\n")[0]
    assert f"--config_file recipes/accelerate/{path.name} " in command


def test_job_files_name_files_that_are_there() -> None:
    folder = ROOT / "recipes" / "cluster"
    subprocess.run(["bash", "-n", str(folder / "slurm.sbatch")], check=True)
    job = yaml.safe_load((folder / "skypilot.yaml").read_text("utf-8"))
    subprocess.run(["bash", "-n"], input=job["setup"] + job["run"], text=True, check=True)
    text = "".join(path.read_text("utf-8") for path in folder.iterdir())
    for path in job["envs"].values():
        assert (ROOT / path).is_file()
    for name in ("ddp", "fsdp2", "multi-node"):
        assert f"recipes/accelerate/{name}.yaml" in text


@pytest.mark.parametrize(
    ("environment", "values", "told"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "fsdp_version must be 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"method": "qlora"}, "in 4 bit"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {"method": "qlora"}, r"take .*/ddp\.yaml"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {}, None),
        ({}, {"method": "qlora"}, None),
    ],
)
def test_what_a_launchers_configuration_cannot_train_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], values: Any, told: str | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if told is None:
        refuse_unfit(settings(**values), 1)
        return
    with pytest.raises(RunError, match=told):
        refuse_unfit(settings(**values), 1)


def test_only_train_runs_in_several_processes(
    pipeline: Pipeline, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = pipeline("data", "mine.yaml")
    assert said.code == 2
    assert "run `pipeline data` by itself" in said.err
    assert not (workplace / "runs").exists()


def test_a_short_pack_filled_up_to_a_block_has_the_same_loss(
    tiny_base: Path, rows_file: Path
) -> None:
    trainer = build_trainer(tiny_base, rows_file, dtype="float32", micro_tokens=60)
    fill_adapter(trainer.model)
    packs = [pack for step in trainer.get_train_dataloader() for pack in step["packs"]]
    short = next(pack for pack in packs if pack["ends"].shape[1] < BLOCK)
    long = next(pack for pack in packs if pack["ends"].shape[1] >= BLOCK)

    filled = fill_block(short)
    size = short["ends"].shape[1]
    assert {key: values.shape for key, values in filled.items()} == dict.fromkeys(
        filled, (1, BLOCK)
    )
    assert (filled["labels"][0, size:] == IGNORED).all()
    mask = dense_mask(filled["ends"])[0, 0]
    assert torch.equal(mask[size:, size:], torch.eye(BLOCK - size, dtype=torch.bool))
    assert not mask[size:, :size].any()
    assert not mask[:size, size:].any()
    loss = trainer.sum_loss(trainer.model, short)
    assert trainer.sum_loss(trainer.model, filled).item() == pytest.approx(loss.item(), rel=1e-5)
    for key, values in fill_block(long).items():
        assert torch.equal(values, long[key])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at each
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_layers_learn_the_same_from_packs_of_any_length(
    tiny_base: Path, rows_file: Path, checkpointing: str
) -> None:
    values = {"dtype": "float32", "micro_tokens": 60, "checkpointing": checkpointing}

    def learn(is_compiled: bool) -> tuple[list[float], dict[str, torch.Tensor], set[int]]:
        trainer = build_trainer(tiny_base, rows_file, **values)
        fill_adapter(trainer.model)
        if checkpointing == "full":
            trainer.model.activation_checkpointing_enable({"use_reentrant": False})
        names = set(trainer.model.state_dict())
        if is_compiled:
            compile_layers(trainer.model, "aot_eager")  # inductor, without its compiler's minutes
        assert set(trainer.model.state_dict()) == names
        trainer.model.train()
        losses, lengths = [], set()
        for step in trainer.get_train_dataloader():
            for pack in step["packs"]:
                lengths.add(pack["ends"].shape[1])
                loss = trainer.sum_loss(trainer.model, pack)
                loss.backward()
                losses.append(loss.item())
        parameters = trainer.model.named_parameters()
        gradients = {name: p.grad for name, p in parameters if p.grad is not None}
        return losses, gradients, lengths

    plain, plain_gradients, lengths = learn(False)
    torch._dynamo.reset()
    counters.clear()
    compiled, gradients, _ = learn(True)

    assert len(lengths) > 3
    # One where the layer's input needs no gradient, the first layer's, and one for all others.
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(plain_gradients[name].abs().max())
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-4, atol=1e-5 * scale)


LAUNCHED = """
import os, signal, sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType

# accelerate shards for GPUs alone, though torch does so over gloo, too.
begin = PartialState.__init__
def as_gpus(self, *inputs, **named):
    begin(self, *inputs, **named)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    PartialState.__init__ = as_gpus

if "STOPPED" in os.environ:
    from pipeline.train.trainer import PackTrainer
    step = PackTrainer.training_step
    def training_step(self, *inputs):
        if self.state.global_step == 2 and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # as a launcher passes on what has come already
        return step(self, *inputs)
    PackTrainer.training_step = training_step

from pipeline.cli import main
main()
"""
RECIPE = (
    "base: base\n"
    "data: {sources: [{path: chats.jsonl}], eval: {path: held.jsonl}}\n"
    "train: {batch_rows: 4, steps: 4, micro_tokens: 120, warmup_steps: 0, learning_rate: 0.01,"
    " dtype: float32, rank: 4}\n"
)


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with two equal recipes, `one` and `two`, and their data."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, tmp_path / "base")
    for name, number in (("chats", 12), ("held", 3)):
        text = "".join(conversation(f"{name} {i}?") for i in range(number))
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "launched.py").write_text(LAUNCHED, encoding="utf-8")
    return tmp_path


def launch(config: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes of ours under accelerate's launcher."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / config), "launched.py"]
    return subprocess.run(
        [*command, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def read_metrics(run: str) -> list[dict[str, float]]:
    text = Path("runs", run, "metrics.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@torch.no_grad()
def logits(adapter: Path | None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model(torch.arange(40)[None]).logits


@pytest.mark.slow
def test_shards_stop_go_on_and_are_gathered_to_the_adapter_of_one_process(
    pipeline: Pipeline, place: Path
) -> None:
    for name in ("one", "two"):
        assert pipeline("data", f"{name}.yaml").code == 0
    assert pipeline("train", "one.yaml").code == 0

    stopped = launch("fsdp2.yaml", "train", "two.yaml", STOPPED="1")
    assert stopped.stderr.count("interrupted; the run goes on from step 3") == 1, stopped.stderr
    assert not Path("runs/two/adapter").exists()
    saved = Path("runs/two/checkpoints/checkpoint-3")
    assert len(list((saved / "pytorch_model_fsdp_0").glob("__*.distcp"))) == 2, "a shard each"
    done = launch("fsdp2.yaml", "train", "two.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("runs/two/adapter") == 1

    kept = ("step", "learning_rate", "num_supervised_tokens", "num_tokens")
    for ours, theirs in zip(read_metrics("two"), read_metrics("one"), strict=True):
        assert {key: ours[key] for key in kept} == {key: theirs[key] for key in kept}
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert not Path("runs/two/checkpoints").exists()
    one, two = logits(Path("runs/one/adapter")), logits(Path("runs/two/adapter"))
    assert (one - logits(None)).abs().max() > 0.1
    torch.testing.assert_close(two, one, rtol=0, atol=1e-3)
    said = pipeline("train", "two.yaml")
    assert "nothing to do" in said.out, "the first process has recorded what all have made"


@pytest.mark.slow
def test_a_mistake_is_told_once_and_what_is_done_is_not_done_again(
    pipeline: Pipeline, place: Path
) -> None:
    assert pipeline("data", "one.yaml").code == 0
    lost = launch("ddp.yaml", "train", "one.yaml", "--set", "train.learning_rate=1e30")
    assert lost.returncode != 0
    assert lost.stderr.count("error: ") == 1, lost.stderr[-3000:]
    assert "train.learning_rate" in lost.stderr
    assert "/pipeline/" not in lost.stderr, "no traceback of ours"
    assert not Path("runs/one/adapter").exists()

    assert pipeline("train", "one.yaml").code == 0
    again = launch("ddp.yaml", "train", "one.yaml")
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("nothing to do") == 1
