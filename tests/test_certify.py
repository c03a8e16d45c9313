"""Certificates: a true merge passes, every planted fault misses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from adapters import make_adapter
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.base.checkpoint import SINGLE
from pipeline.certify import stage
from pipeline.certify.gguf import TOP, ask_gguf
from pipeline.certify.measure import (
    HeldOut,
    choose_positions,
    compare,
    compare_likeliest,
    logits_at,
)
from pipeline.certify.stage import Trained, certify
from pipeline.certify.verdict import judge, refuse_if_missed
from pipeline.errors import GateMissed, RunError
from pipeline.merge import merge
from pipeline.recipe import Certify, GgufFormat

ROWS: list[HeldOut] = [
    ([257, 10, 20], [30, 40, 50, 258], "direct"),
    ([257, 11, 21], [31, 258], "direct"),
    ([257, 12], [260, 13, 261, 14, 258], "thinking"),
]
SETTINGS = Certify(merged_positions=100, gguf_positions=6)
LIMITS = SETTINGS.max_mean_kl.model_dump()
Weights = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
KEY = "model.layers.1.self_attn.k_proj.weight"


def load(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def merged(tiny_base: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merges") / "merged"
    merge(tiny_base, tiny_adapter, out)
    return out


def measure(
    base: Path, adapter: Path, merged: Path, folder: Path, method: str = "lora"
) -> dict[str, Any]:
    """The certificate of a merge alone."""
    return certify(Trained(base, adapter, method), merged, {}, ROWS, SETTINGS, folder / "log")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_true_merge_is_certified(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, method: Any
) -> None:
    merge(tiny_base, tiny_adapter, tmp_path / "merged", method)
    certificate = measure(tiny_base, tiny_adapter, tmp_path / "merged", tmp_path, method)
    artefact = certificate["artefacts"]["merged"]
    assert certificate["passed"]
    assert (artefact["adapted"], artefact["wrong_values"]) == (14, 0)
    assert artefact["values"] == sum(p.numel() for p in load(tiny_base).parameters())
    assert artefact["positions"] == 11
    assert 0 < artefact["mean_kl"] <= artefact["max_kl"] < 1e-3
    assert artefact["float32_max_logit_error"] < 1e-5 * artefact["max_logit"]
    refuse_if_missed(certificate)


def test_a_merge_kept_in_float32_is_certified_to_float32s_own_noise(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    merge(tiny_base, tiny_adapter, tmp_path / "merged", dtype="float32")
    certificate = measure(tiny_base, tiny_adapter, tmp_path / "merged", tmp_path)
    artefact = certificate["artefacts"]["merged"]
    assert artefact["wrong_values"] == 0
    assert artefact["mean_kl"] < 1e-9
    assert artefact["top1_agreement"] == 1.0


def transposed(weights: Weights, _: Weights) -> None:
    weights[KEY] = weights[KEY].T.contiguous()


def permuted(weights: Weights, _: Weights) -> None:
    weights[UP] = weights[UP].flip(0).contiguous()


def left_unmerged(weights: Weights, base: Weights) -> None:
    weights[KEY] = base[KEY]


def changed_beside_the_adapter(weights: Weights, _: Weights) -> None:
    weights["lm_head.weight"][0, 0] += 1


def one_value_off_by_one_step(weights: Weights, _: Weights) -> None:
    bits = weights[UP].view(torch.int16)
    bits[3, 5] += 1


FAULTS = [
    transposed, permuted, left_unmerged, changed_beside_the_adapter, one_value_off_by_one_step
]  # fmt: skip


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_in_the_weights_is_not_certified(
    tiny_base: Path,
    tiny_adapter: Path,
    merged: Path,
    tmp_path: Path,
    plant: Callable[[Weights, Weights], None],
) -> None:
    harmed = Path(shutil.copytree(merged, tmp_path / "harmed"))
    weights = load_file(harmed / SINGLE)
    plant(weights, load_file(tiny_base / SINGLE))
    save_file(weights, harmed / SINGLE, metadata={"format": "pt"})
    refused(measure(tiny_base, tiny_adapter, harmed, tmp_path))


def refused(certificate: dict[str, Any]) -> None:
    artefact = certificate["artefacts"]["merged"]
    assert artefact["wrong_values"] > 0
    assert not artefact["passed"]
    assert not certificate["passed"]
    with pytest.raises(GateMissed, match=r"^not certified: merged \(mean KL .*wrong values [1-9]"):
        refuse_if_missed(certificate)


def test_a_wrong_scale_is_not_certified(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    doubled = Path(shutil.copytree(tiny_adapter, tmp_path / "doubled"))
    config = json.loads((doubled / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (doubled / "adapter_config.json").write_text(json.dumps(config))
    merge(tiny_base, doubled, tmp_path / "merged")
    refused(measure(tiny_base, tiny_adapter, tmp_path / "merged", tmp_path))


def test_a_merge_into_another_base_is_not_certified(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    weights = load_file(other / SINGLE)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, other / SINGLE, metadata={"format": "pt"})
    merge(other, tiny_adapter, tmp_path / "merged")
    refused(measure(tiny_base, tiny_adapter, tmp_path / "merged", tmp_path))


def test_a_qlora_adapter_merged_into_the_unquantised_base_is_not_certified(
    tiny_base: Path, tiny_adapter: Path, merged: Path, tmp_path: Path
) -> None:
    refused(measure(tiny_base, tiny_adapter, merged, tmp_path, "qlora"))


def test_a_checkpoint_of_other_tensors_cannot_be_certified(
    tiny_base: Path, tiny_adapter: Path, merged: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(merged, tmp_path / "other"))
    weights = load_file(other / SINGLE)
    del weights[KEY]
    save_file(weights, other / SINGLE, metadata={"format": "pt"})
    with pytest.raises(RunError, match="does not hold the same tensors as"):
        measure(tiny_base, tiny_adapter, other, tmp_path)


def test_a_tensor_of_another_shape_cannot_be_certified(
    tiny_base: Path, tiny_adapter: Path, merged: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(merged, tmp_path / "other"))
    weights = load_file(other / SINGLE)
    weights[UP] = weights[UP].T.contiguous()
    save_file(weights, other / SINGLE, metadata={"format": "pt"})
    with pytest.raises(RunError, match="does not hold the same tensors as"):
        measure(tiny_base, tiny_adapter, other, tmp_path)


def test_a_divergence_over_its_limit_misses_the_gate_with_exit_code_3() -> None:
    artefacts = {"bf16": {"mean_kl": 0.001}, "q8_0": {"mean_kl": 0.5}}
    certificate = judge(artefacts, LIMITS)
    passed = {name: artefact["passed"] for name, artefact in certificate["artefacts"].items()}
    assert passed == {"bf16": True, "q8_0": False}
    with pytest.raises(GateMissed, match=r"q8_0 \(mean KL 0\.5, allowed 0\.02, wrong") as caught:
        refuse_if_missed(certificate)
    assert "bf16" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_divergence_that_is_not_a_number_never_passes() -> None:
    certificate = judge({"merged": {"mean_kl": float("nan")}}, LIMITS)
    assert not certificate["passed"]


def test_every_artefact_there_can_be_has_a_limit() -> None:
    assert set(LIMITS) == {"merged", *get_args(GgufFormat)}
    with pytest.raises(KeyError):
        judge({"other": {"mean_kl": 0.0}}, LIMITS)


@pytest.mark.parametrize(
    ("error", "max_logit", "passed"),
    [
        (8.1e-05, 44.5, True),  # as measured for the demo
        (0.02, 44.5, True),
        (0.03, 44.5, False),
        (float("nan"), 44.5, False),
        (0.0, float("nan"), False),
    ],
)
def test_logits_that_differ_in_float32_by_more_than_rounding_miss_the_gate(
    error: float, max_logit: float, passed: bool
) -> None:
    measured = {"mean_kl": 0.0, "float32_max_logit_error": error, "max_logit": max_logit}
    certificate = judge({"merged": measured}, LIMITS)
    assert certificate["passed"] is passed
    if not passed:
        with pytest.raises(GateMissed, match=f"float32 logit error {error:.2g}, allowed "):
            refuse_if_missed(certificate)


@pytest.mark.parametrize(
    ("free", "device"), [(None, "cpu"), (0, "cpu"), (1250, "cpu"), (1251, "cuda")]
)
def test_a_model_goes_to_the_gpu_only_where_it_fits_with_room(
    free: int | None, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert stage._choose_device(1000, free) == device
    falls_back = free is not None and device == "cpu"
    assert ("comparing on the CPU: it takes 0.0 GB" in caplog.text) == falls_back


logits = st.lists(
    st.lists(st.floats(-15, 15, width=32), min_size=6, max_size=6), min_size=1, max_size=3
).map(torch.tensor)


def most_likely(candidate: torch.Tensor, count: int) -> list[dict[int, float]]:
    """What an engine answers: the likeliest tokens' log-probabilities."""
    rows = torch.log_softmax(candidate.double(), dim=-1)
    return [
        {int(token): float(row[token]) for token in row.argsort(descending=True)[:count]}
        for row in rows
    ]


@given(logits)
def test_a_model_does_not_diverge_from_itself(reference: torch.Tensor) -> None:
    same = compare(reference, reference.clone())
    assert (same["mean_kl"], same["max_kl"], same["max_logit_difference"]) == (0.0, 0.0, 0.0)
    assert (same["top1_agreement"], same["positions"]) == (1.0, len(reference))


@given(logits, st.randoms(), st.integers(1, 6))
def test_likeliest_tokens_alone_bound_the_divergence_from_below(
    reference: torch.Tensor, random: Any, count: int
) -> None:
    candidate = reference + torch.tensor([[random.uniform(-3, 3) for _ in range(6)]])
    full = compare(reference, candidate)
    part = compare_likeliest(reference, most_likely(candidate, count))
    assert part["mean_kl"] <= full["mean_kl"] + 1e-9
    assert part["max_kl"] <= full["max_kl"] + 1e-9


@given(logits, st.randoms())
def test_all_tokens_give_the_whole_divergence(reference: torch.Tensor, random: Any) -> None:
    candidate = reference + torch.tensor([[random.uniform(-3, 3) for _ in range(6)]])
    full = compare(reference, candidate)
    part = compare_likeliest(reference, most_likely(candidate, 6))
    assert part["mean_kl"] == pytest.approx(full["mean_kl"], rel=1e-6, abs=1e-9)
    assert part["positions"] == full["positions"]


def test_divergence_and_agreement_are_those_of_the_textbook() -> None:
    reference = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]))
    candidate = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]))
    found = compare(reference, candidate)
    one = 0.25 * torch.log(torch.tensor(2.0)).item()  # 0.5 ln 2 - 0.25 ln 2
    assert found["max_kl"] == pytest.approx(one, rel=1e-6)
    assert found["mean_kl"] == pytest.approx(one / 2, rel=1e-6)
    assert found["top1_agreement"] == 0.5


def test_positions_are_whole_rows_with_the_modes_in_turn() -> None:
    direct, second, thinking = ROWS
    every = choose_positions(ROWS, 100)
    expected = [
        tuple(prompt + completion[:size])
        for prompt, completion, _ in (direct, thinking, second)
        for size in range(len(completion))
    ]
    assert every == expected
    assert choose_positions(ROWS, 5) == expected[:5]
    assert {position[:2] for position in every[:5]} == {(257, 10), (257, 12)}


def test_logits_are_those_of_each_position_run_alone(tiny_base: Path) -> None:
    model = load(tiny_base)
    positions = choose_positions(ROWS, 100)
    positions = [*positions[::-1], positions[3]]  # whatever their order, and one of them twice
    found = logits_at(model, positions)
    assert found.dtype == torch.float32
    with torch.no_grad():
        alone = [model(torch.tensor([position])).logits[0, -1] for position in positions]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_a_gguf_file_is_measured_against_its_own_checkpoint_and_against_another(
    tiny_base: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    positions = choose_positions(ROWS, 100)
    answers = ask_gguf(tiny_gguf, positions, tmp_path / "log")
    assert [len(answer) for answer in answers] == [TOP] * len(positions)
    own = compare_likeliest(logits_at(load(tiny_base), positions), answers)
    assert own["mean_kl"] < 1e-4
    assert own["top1_agreement"] > 0.9

    adapter = make_adapter(tiny_base, tmp_path / "adapter", b_scale=0.05)
    merge(tiny_base, adapter, tmp_path / "merged")
    other = compare_likeliest(logits_at(load(tmp_path / "merged"), positions), answers)
    assert other["mean_kl"] > 100 * own["mean_kl"]


def test_a_gguf_file_of_the_base_is_no_gguf_file_of_the_merge(
    tiny_base: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", b_scale=0.05)
    merge(tiny_base, adapter, tmp_path / "merged")
    certificate = certify(
        Trained(tiny_base, adapter, "lora"),
        tmp_path / "merged",
        {"bf16": tiny_gguf},
        ROWS,
        SETTINGS,
        tmp_path / "log",
    )
    assert certificate["artefacts"]["merged"]["passed"]
    assert certificate["artefacts"]["bf16"]["positions"] == 6
    assert not certificate["artefacts"]["bf16"]["passed"]
    with pytest.raises(GateMissed, match="not certified: bf16"):
        refuse_if_missed(certificate)
