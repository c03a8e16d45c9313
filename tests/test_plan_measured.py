"""Predictions beside real trainings: what autograd keeps, and what a run tells of itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import build_trainer, make_talks
from trainers import settings as make_settings

from pipeline.chat import Chat
from pipeline.data.store import ROWS, Writer, to_batch
from pipeline.errors import RunError
from pipeline.plan.memory import layer_bytes
from pipeline.plan.score import compare, measure, tell
from pipeline.plan.shape import read_shape
from pipeline.train.memory import explain, memory_told

PREDICTED: dict[str, Any] = {
    "memory_bytes": {
        "weights": 16 * 10**9,
        "adapter": 10**8,
        "optimizer": 10**8,
        "gradients": 10**8,
        "activations": 40 * 10**9,
        "logits": 2 * 10**9,
        "mask": 0,
        "fixed": 10**9,
        "peak": 59_300_000_000,
    },
    "machine": {"name": "H100", "devices": 1, "memory_bytes": 75 * 10**9},
    "changes": [],
    "if_too_large": "train.micro_tokens: 4096",
    "seconds_per_step": 2.0,
    "tokens_per_step": 100,
    "steps": 3,
}


@pytest.fixture(scope="module")
def rows_file(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.arrow"
    with Writer(path, ROWS) as writer:
        writer.write(to_batch(make_talks(chat), ROWS))
    return path


def kept_bytes(base: Path, rows_file: Path, **values: Any) -> float:
    """What autograd keeps of the layers' own tensors, in bytes a token."""
    trainer = build_trainer(base, rows_file, micro_tokens=4096, batch_rows=16, **values)
    if values.get("checkpointing") == "full":  # which the trainer turns on when it begins
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    model = trainer.accelerator.prepare(trainer.model)
    model.train()
    (pack,) = trainer.data_collator([{"share": 0}])["packs"]
    tokens = pack["input_ids"].shape[1]
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes = list(tensor.shape)
        is_mask, is_logits = sizes.count(tokens) > 1, sizes[-1:] == [320]
        if tokens in sizes and not is_mask and not is_logits:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.sum_loss(model, pack)
    return sum(found.values()) / tokens


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"target_modules": ("q_proj", "v_proj")},
        {"dtype": "float32"},
        {"method": "qlora"},
        {"variant": "dora"},
        {"dropout": 0.1},
        {"method": "full", "learning_rate": 1e-5},
    ],
    ids=str,
)
def test_layers_keep_the_bytes_that_were_derived_for_them(
    tiny_base: Path, rows_file: Path, values: dict[str, Any]
) -> None:
    """The last norm's input is beside them; the first layer keeps a little less than the others,
    for nothing before its first adapter learns."""
    given = {} if values.get("method") == "full" else {"rank": 4, "alpha": 8}
    kept = kept_bytes(tiny_base, rows_file, **given, **values)
    shape = read_shape(tiny_base)
    chosen = make_settings(**given, **values)
    derived = shape.layers * layer_bytes(chosen, shape, is_cpu=True) + 4 * shape.hidden
    assert 0.93 * derived < kept < 1.01 * derived


def test_with_checkpointing_only_the_layers_inputs_are_kept(
    tiny_base: Path, rows_file: Path
) -> None:
    kept = kept_bytes(tiny_base, rows_file, checkpointing="full")
    shape = read_shape(tiny_base)
    assert kept <= shape.layers * 2 * shape.hidden + 6 * shape.hidden
    assert kept >= (shape.layers - 1) * 2 * shape.hidden


# ------------------------------------------------------------------ a run's own figures


def test_a_run_is_measured_without_its_first_step_and_compared(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"num_tokens": 80, "seconds": seconds} for seconds in (90.0, 3.0, 5.0)]
    lines.insert(1, {"eval_loss": 2.0})  # what is measured between steps is no step
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))

    measured = measure({"peak_bytes": 29_150_000_000}, metrics)

    assert measured["tokens"] == 240
    assert measured["seconds_per_step"] == 4.0
    # Torch's own peak is without the context: 58.3 GB of the plan's lines.
    expected = {"peak_bytes": 0.5, "seconds_per_step": 2.0, "tokens": 0.8}
    assert compare(PREDICTED, measured) == expected
    assert tell(PREDICTED, measured) == (
        "peak memory 29.15 GB (0.50 of the plan), seconds a step 4 (2.00 of the plan), "
        "tokens 240 (0.80 of the plan)"
    )
    on_cpu = PREDICTED | {"machine": {"name": "CPU", "devices": 1, "memory_bytes": 75 * 10**9}}
    assert compare(on_cpu, measured)["peak_bytes"] == 0.492


# ------------------------------------------------------------------ out of memory

CUDA = (
    "CUDA out of memory. Tried to allocate {}. GPU 0 has a total capacity of 79.25 GiB of which "
    "1.2 GiB is free."
)
CPU = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried "


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA.format("96.00 MiB")),
        RuntimeError(CPU + "to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_in_a_step_is_one_sentence_with_what_to_set(
    tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trainer = build_trainer(tiny_base, rows_file)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(trainer.model.get_base_model().model.layers[1], "forward", fail)
    with pytest.raises(RunError) as caught, memory_told(PREDICTED):
        trainer.train()

    told = str(caught.value)
    assert "\n" not in told
    assert "'activations'" in told
    assert "59.3 GB" in told
    assert "set train.micro_tokens: 4096" in told
    assert caught.value.exit_code == 2


def test_other_failures_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape") as caught, memory_told(PREDICTED):
        raise RuntimeError("shape mismatch")
    assert not isinstance(caught.value, RunError)


@pytest.mark.parametrize(
    ("held", "size", "line"),
    [
        (10 * 10**9, "96.00 MiB", "weights"),
        (70 * 10**9, "96.00 MiB", "activations"),
        (70 * 10**9, "2.00 GiB", "logits"),
    ],
)
def test_the_line_that_was_wrong_is_found_from_what_was_held_and_asked(
    held: int, size: str, line: str
) -> None:
    told = explain(PREDICTED, CUDA.format(size), held)
    assert f"its line {line!r} is too low" in told
    assert f"and {(held + float(size[:-4]) * (2**20 if 'M' in size else 2**30)) / 1e9:.1f}" in told


def test_a_run_that_was_not_to_fit_names_the_first_change() -> None:
    small = {"name": "L4", "devices": 1, "memory_bytes": 20 * 10**9}
    changes = [{"set": "train.method: qlora", "peak_bytes": 1}]
    told = explain(PREDICTED | {"machine": small, "changes": changes}, "", 1)
    assert told == (
        "out of memory, as the plan said: 59.3 GB predicted, 20.0 GB usable on L4; "
        "set train.method: qlora"
    )
