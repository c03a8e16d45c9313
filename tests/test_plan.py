"""Predictions: the sizes of a real checkpoint, and sentences for a config that gives none."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIG as TINY
from safetensors import safe_open

from pipeline.base.checkpoint import SINGLE
from pipeline.errors import BaseError
from pipeline.plan import ADAM_BYTES, NF4_BYTES, predict, read_shape
from pipeline.recipe import Train

# What a prediction needs of a config: whether the head is tied may be left out.
CONFIG = {key: value for key, value in TINY.items() if key != "tie_word_embeddings"}
COUNTS = {"rows": 40, "prompt_tokens": 3000, "supervised_tokens": 1000, "longest_row": 150}
LINEAR = 2 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128)
EMBEDDINGS = 2 * 320 * 64


def written(folder: Path, config: Any) -> Path:
    """A base of nothing but a config."""
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in CONFIG.items() if name != key}


def test_the_weights_are_those_of_the_checkpoint_but_for_its_norms(tiny_base: Path) -> None:
    with safe_open(tiny_base / SINGLE, "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    predicted = predict(Train(rank=4), tiny_base, COUNTS)
    assert predicted["parameters"]["base"] == sum(sizes.values()) - norms == LINEAR + EMBEDDINGS
    assert norms < 0.01 * sum(sizes.values())


def test_the_adapter_is_as_large_as_one_that_is_made(tiny_base: Path, tiny_adapter: Path) -> None:
    with safe_open(tiny_adapter / "adapter_model.safetensors", "pt") as file:
        made = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    predicted = predict(Train(rank=4), tiny_base, COUNTS)
    assert predicted["parameters"]["trained"] == made
    assert predicted["memory_bytes"]["adapter_and_optimizer"] == made * ADAM_BYTES


def test_only_the_linear_weights_of_qlora_are_in_4_bit(tmp_path: Path) -> None:
    base = written(tmp_path, CONFIG)
    lora = predict(Train(), base, COUNTS)["memory_bytes"]["weights"]
    qlora = predict(Train(method="qlora"), base, COUNTS)["memory_bytes"]["weights"]
    float32 = predict(Train(dtype="float32"), base, COUNTS)["memory_bytes"]["weights"]
    assert lora == 2 * (LINEAR + EMBEDDINGS)
    assert float32 == 2 * lora
    assert qlora == int(LINEAR * NF4_BYTES + EMBEDDINGS * 2)


def test_tied_embeddings_are_held_once(tmp_path: Path) -> None:
    base = written(tmp_path, CONFIG | {"tie_word_embeddings": True})
    assert predict(Train(), base, COUNTS)["parameters"]["base"] == LINEAR + EMBEDDINGS // 2


def test_named_modules_alone_are_trained(tmp_path: Path) -> None:
    settings = Train(rank=4, target_modules=("q_proj", "down_proj"))
    predicted = predict(settings, written(tmp_path, CONFIG), COUNTS)
    assert predicted["parameters"]["trained"] == 2 * 4 * ((64 + 128) + (128 + 64))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (Train(batch_rows=16), 3),
        (Train(batch_rows=16, epochs=2), 5),
        (Train(batch_rows=16, steps=7), 7),
    ],
)
def test_steps_and_operations_follow_from_the_rows(
    tmp_path: Path, settings: Train, steps: int
) -> None:
    predicted = predict(settings, written(tmp_path, CONFIG), COUNTS)
    assert predicted["steps"] == steps
    assert predicted["operations"] == 6 * LINEAR * steps * 16 * 100
    assert (predicted["tokens_per_epoch"], predicted["supervised_tokens_per_epoch"]) == (4000, 1000)


def test_without_checkpointing_there_is_more_to_hold_and_less_to_compute(tmp_path: Path) -> None:
    base = written(tmp_path, CONFIG)
    full, none = (predict(Train(checkpointing=c), base, COUNTS) for c in ("full", "none"))
    assert full["memory_bytes"]["activations"] < none["memory_bytes"]["activations"]
    assert full["operations"] == 1.5 * none["operations"]
    for predicted in (full, none):
        *parts, peak = predicted["memory_bytes"].values()
        assert peak == sum(parts)


@pytest.mark.parametrize(("micro_tokens", "held"), [(10, 150), (400, 400), (10**6, 1600)])
def test_at_least_the_longest_row_is_held_and_at_most_a_step(
    tmp_path: Path, micro_tokens: int, held: int
) -> None:
    base = written(tmp_path, CONFIG)
    memory = predict(Train(batch_rows=16, micro_tokens=micro_tokens), base, COUNTS)["memory_bytes"]
    assert memory["logits"] == held * 320 * 4 * 2
    assert memory["activations"] == held * 2 * 64 * 2


def test_every_head_has_its_own_keys_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    assert read_shape(written(tmp_path, without("num_key_value_heads"))).key_heads == 4
    assert read_shape(written(tmp_path, CONFIG)).key_heads == 2


def test_a_head_is_its_part_of_the_width_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    assert read_shape(written(tmp_path, without("head_dim"))).head == 16
    assert read_shape(written(tmp_path, CONFIG)).head == 32


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    ],
)
@pytest.mark.parametrize("value", [None, 0, "64", True, [64]])
def test_a_config_without_a_size_is_one_sentence_that_names_it(
    tmp_path: Path, key: str, value: Any
) -> None:
    base = written(tmp_path, CONFIG | {key: value})
    with pytest.raises(BaseError) as caught:
        predict(Train(), base, COUNTS)
    told = f"{base / 'config.json'} gives no {key}, so nothing can be predicted from it"
    assert str(caught.value) == told


@pytest.mark.parametrize("text", ["{", "[]", "null", ""])
def test_a_config_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(BaseError, match=r"config\.json cannot be read as a model's config"):
        predict(Train(), written(tmp_path, text), COUNTS)


def test_a_missing_config_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"config\.json cannot be read as a model's config"):
        predict(Train(), tmp_path, COUNTS)
