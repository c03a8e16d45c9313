"""Training itself: what is learnt from, what moves, and what the log says."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from row_files import write_rows
from safetensors.torch import load_file
from trainers import build_trainer, fill_adapter, settings
from transformers import AutoTokenizer

from pipeline.chat import Chat
from pipeline.data.rows import Row
from pipeline.errors import BaseError, RecipeError, RunError
from pipeline.train.attention import dense_mask
from pipeline.train.model import load_base, with_adapter
from pipeline.train.stage import read_steps, train
from pipeline.tree import IGNORED

TALKS = (
    ("Is it open?", "", "Yes, until nine."),
    ("What is two and two?", "Two and two make four.", "Four."),
    ("Wer bist du?", "", "Ein kleines Modell."),
    ("Where is my parcel?", "Parcels take a day. It left today.", "It comes tomorrow."),
)


@pytest.fixture(scope="session")
def rows(chat: Chat) -> list[Row]:
    found = []
    for number, (question, reasoning, answer) in enumerate(TALKS):
        reply = {"role": "assistant", "content": answer, "reasoning": reasoning}
        for turn in chat.turns([{"role": "user", "content": question}, reply], None):
            ids = (turn.prompt_ids, turn.completion_ids)
            found.append(Row(*ids, f"talk:{number}", 1, turn.mode))
    return found


@pytest.fixture(scope="session")
def rows_file(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.arrow"
    write_rows(path, rows)
    return path


@pytest.fixture(scope="session")
def trained(
    tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, float]]]:
    """The folder of a training of two steps with a method, and what it measured; once each."""
    done: dict[str, tuple[Path, dict[str, float]]] = {}

    def run(method: str) -> tuple[Path, dict[str, float]]:
        if method not in done:
            out = tmp_path_factory.mktemp(method)
            done[method] = (out, train(settings(method=method), tiny_base, rows_file, out))
        return done[method]

    return run


KEYS = {
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "num_supervised_tokens",
    "num_tokens",
    "num_row_tokens",
    "seconds",
}


def read_metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def adapter_weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(out / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize("packing", ["tree", "none"])
def test_labels_cover_exactly_the_completions(
    tiny_base: Path, rows: list[Row], rows_file: Path, packing: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    packs = read_steps(rows_file, settings(packing=packing), 1)([{"share": 0}])["packs"]
    assert len(packs) > 1, "so many rows are more than one micro-batch"
    texts = []
    for pack in packs:
        labels = pack["labels"][0]
        learnt = labels != IGNORED
        assert torch.equal(labels[learnt], pack["input_ids"][0][learnt])
        texts += tokenizer.decode(labels[learnt]).split("<|im_end|>")
    expected = {f"<think>\n{why}\n</think>\n\n{text}" if why else text for _, why, text in TALKS}
    assert len(texts) == len(TALKS) + len(packs)
    assert set(texts) == expected | {""}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_two_steps_on_the_same_rows_lower_the_loss(trained: Any, method: str) -> None:
    out, measured = trained(method)
    losses = [line["loss"] for line in read_metrics(out)]
    assert measured["steps"] == 2
    assert 5 < losses[0] < 6.5, "an untrained model knows nothing: about ln 320"
    assert losses[1] < losses[0] - 0.1


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_adapter_is_on_every_linear_layer_moved_and_float32(trained: Any, method: str) -> None:
    weights = adapter_weights(trained(method)[0])
    assert len(weights) == 2 * 7 * 2
    for name, values in weights.items():
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()
        if ".lora_B." in name:
            assert values.abs().max() > 0, "B begins at zero"
    assert not any("embed" in name or "lm_head" in name for name in weights)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_frozen_weights_keep_every_bit(tiny_base: Path, rows_file: Path, method: str) -> None:
    trainer = build_trainer(tiny_base, rows_file, method=method)

    def frozen() -> dict[str, str]:
        return {
            name: hashlib.sha256(p.detach().flatten().view(torch.uint8).numpy()).hexdigest()
            for name, p in trainer.model.named_parameters()
            if not p.requires_grad
        }

    before = frozen()
    trainer.train()
    assert len(before) == 25
    assert frozen() == before
    moving = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(moving) == 28
    assert all(p.dtype == torch.float32 for p in moving)


def test_the_cheap_loss_on_a_cpu_is_that_of_trls_head(tiny_base: Path, rows_file: Path) -> None:
    trainer = build_trainer(tiny_base, rows_file, dtype="float32", micro_tokens=4096)
    (pack,) = next(iter(trainer.get_train_dataloader()))["packs"]
    fill_adapter(trainer.model)

    ours = trainer.sum_loss(trainer.model, pack)
    theirs = -trainer.model(
        input_ids=pack["input_ids"],
        position_ids=pack["position_ids"],
        attention_mask=dense_mask(pack["ends"]),
        labels=pack["labels"],
        fused_lm_head=True,
    ).log_probs.sum()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    our_gradients = torch.autograd.grad(ours, parameters)
    their_gradients = torch.autograd.grad(theirs, parameters)

    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for our, their in zip(our_gradients, their_gradients, strict=True):
        scale = float(their.abs().max())
        assert scale > 0
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5 * scale)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(
    trained: Any, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    first = (trained("lora")[0] / "adapter" / "adapter_model.safetensors").read_bytes()
    for seed, is_same in ((42, True), (43, False)):
        out = tmp_path / str(seed)
        out.mkdir()
        train(settings(seed=seed), tiny_base, rows_file, out)
        again = (out / "adapter" / "adapter_model.safetensors").read_bytes()
        assert (again == first) is is_same


def test_the_log_has_a_line_a_step_and_its_counts_add_up(trained: Any, rows: list[Row]) -> None:
    out, measured = trained("lora")
    lines = read_metrics(out)
    assert all(set(line) == KEYS for line in lines)
    assert [line["step"] for line in lines] == [1, 2]
    num_learnt = sum(len(row.completion_ids) for row in rows)
    num_prompt = sum(len(row.prompt_ids) for row in rows)
    for line in lines:  # both steps see all four rows
        assert line["num_supervised_tokens"] == num_learnt
        assert line["num_row_tokens"] == num_learnt + num_prompt
        assert num_learnt < line["num_tokens"] <= line["num_row_tokens"]
        assert line["seconds"] > 0
        assert line["grad_norm"] > 0
        assert line["learning_rate"] == 0.02
    assert sum(line["seconds"] for line in lines) <= measured["seconds"] + 0.1
    assert measured["peak_bytes"] > 50_000_000


@pytest.mark.parametrize("word", ["selective", "full"])
def test_checkpointing_changes_nothing_but_memory(
    word: str, trained: Any, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    train(settings(checkpointing=word), tiny_base, rows_file, tmp_path)
    for name, values in adapter_weights(trained("lora")[0]).items():
        torch.testing.assert_close(adapter_weights(tmp_path)[name], values)


@pytest.mark.parametrize(
    ("word", "passes"), [("none", [1, 1]), ("selective", [2, 1]), ("full", [2, 2])]
)
def test_which_layers_are_computed_again(
    word: str, passes: list[int], tiny_base: Path, rows_file: Path
) -> None:
    trainer = build_trainer(tiny_base, rows_file, checkpointing=word, micro_tokens=10_000, steps=1)
    calls = []
    for number, layer in enumerate(trainer.model.base_model.model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))
    trainer.train()
    assert [calls.count(0), calls.count(1)] == passes


def test_chosen_modules_alone_get_an_adapter(tiny_base: Path) -> None:
    chosen = settings(target_modules=["q_proj"])
    model = with_adapter(load_base(tiny_base, chosen), chosen)
    moving = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(moving) == 4
    assert all("q_proj" in name for name in moving)


def test_a_module_the_base_has_not_is_the_recipes_fault(tiny_base: Path) -> None:
    chosen = settings(target_modules=["c_attn"])
    with pytest.raises(RecipeError, match=r"^train\.target_modules: .*c_attn"):
        with_adapter(load_base(tiny_base, chosen), chosen)


def test_training_that_stops_leaves_no_scratch_folder(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        train(settings(), tiny_base, tmp_path / "none.arrow", tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_file_without_rows_is_one_sentence(tmp_path: Path) -> None:
    write_rows(tmp_path / "none.arrow", [])
    with pytest.raises(RunError, match=r"none\.arrow holds no rows: to learn .*train\.objective"):
        read_steps(tmp_path / "none.arrow", settings(), 1)


def test_a_base_that_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseError, match=r"cannot be loaded: ") as caught:
        load_base(tmp_path, settings())
    assert "\n" not in str(caught.value)
