"""Certificates: a true merge passes, every planted fault misses."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.base.checkpoint import SINGLE
from pipeline.base.nf4 import as_trained, quantised_weights
from pipeline.certify.measure import HeldOut
from pipeline.certify.model import Trained, choose_device, load_adapted, rounded_to_bf16
from pipeline.certify.stage import certify
from pipeline.certify.verdict import refuse_if_missed
from pipeline.errors import GateMissed, RunError
from pipeline.merge import merge
from pipeline.recipe import Certify, Merge, MinTop1

RANDOM = random.Random(0)
ROWS: list[HeldOut] = [
    ([257, *RANDOM.choices(range(256), k=5)], [*RANDOM.choices(range(256), k=12), 258], mode)
    for mode in ("direct", "thinking")
    for _ in range(12)
]
SETTINGS = Certify(
    merged_positions=400,
    greedy_prompts=3,
    greedy_tokens=4,
    min_top1=MinTop1(merged=0.95, adapter=0.95),  # random weights hardly prefer a token to others
)
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
    base: Path, adapter: Path, merged: Path, method: Any = "lora", **settings: Any
) -> dict[str, Any]:
    """The certificate of a merge."""
    trained, log = Trained(base, adapter, method), merged.parent / "log"
    return certify(trained, {"merged": merged}, ROWS, SETTINGS, log, Merge(**settings))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_true_merge_is_certified(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, method: Any
) -> None:
    merge(tiny_base, tiny_adapter, tmp_path / "merged", method)
    certificate = measure(tiny_base, tiny_adapter, tmp_path / "merged", method)
    artefact = certificate["artefacts"]["merged"]
    assert certificate["passed"]
    assert certificate["recommended"] == "merged"
    assert (artefact["adapted"], artefact["wrong_values"]) == (14, 0)
    assert artefact["values"] == sum(p.numel() for p in load(tiny_base).parameters())
    assert artefact["positions"] == 312
    modes = artefact["by_mode"]
    assert {mode: found["positions"] for mode, found in modes.items()} == {
        "direct": 156,
        "thinking": 156,
    }
    assert sum(found["mean_kl"] for found in modes.values()) / 2 == pytest.approx(
        artefact["mean_kl"]
    )
    assert modes["direct"]["effect"] != modes["thinking"]["effect"]
    assert 0 < artefact["mean_kl"] <= artefact["max_kl"] < 1e-3
    assert 0.99 < artefact["effect"] < 1
    assert artefact["perplexity"] == pytest.approx(artefact["trained_perplexity"], rel=1e-2)
    assert artefact["greedy_answers"] == 3
    assert artefact["float32_max_logit_error"] < 1e-5 * artefact["max_logit"]
    refuse_if_missed(certificate)


def test_a_merge_kept_in_float32_is_certified_to_float32s_own_noise(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    merge(tiny_base, tiny_adapter, tmp_path / "merged", settings=Merge(dtype="float32"))
    certificate = measure(tiny_base, tiny_adapter, tmp_path / "merged", dtype="float32")
    artefact = certificate["artefacts"]["merged"]
    assert artefact["wrong_values"] == 0
    assert artefact["mean_kl"] < 1e-9
    assert artefact["effect"] == pytest.approx(1, abs=1e-6)
    assert (artefact["top1_agreement"], artefact["greedy_same"]) == (1.0, 1.0)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_of_zeros_changes_nothing_at_all(
    tiny_base: Path, tmp_path: Path, method: Any
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "zero", b_scale=0)
    merge(tiny_base, adapter, tmp_path / "merged", method)
    certificate = measure(tiny_base, adapter, tmp_path / "merged", method)
    for artefact in certificate["artefacts"].values():
        assert (artefact["mean_kl"], artefact["max_logit_difference"]) == (0, 0)
        assert artefact["effect"] is None
    assert certificate["passed"]


def test_the_adapter_beside_its_base_has_an_entry_of_its_own(
    tiny_base: Path, tiny_adapter: Path, merged: Path
) -> None:
    adapter = measure(tiny_base, tiny_adapter, merged)["artefacts"]["adapter"]
    assert adapter["passed"]
    assert 0 < adapter["mean_kl"] < 1e-3  # its factors are rounded to bf16
    model = load_adapted(Trained(tiny_base, tiny_adapter, "lora"))
    before = {name: values.clone() for name, values in model.named_parameters()}
    with rounded_to_bf16(model):
        for values in model.parameters():
            assert torch.equal(values, values.bfloat16().float())
    for name, values in model.named_parameters():
        assert torch.equal(values, before[name])
    assert any(not torch.equal(v, v.bfloat16().float()) for v in before.values())


def test_an_adapter_too_small_for_bf16_is_to_be_served_unmerged(
    tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "small", b_scale=2e-5)
    merge(tiny_base, adapter, tmp_path / "merged")
    certificate = measure(tiny_base, adapter, tmp_path / "merged")
    lost, kept = (certificate["artefacts"][name] for name in ("merged", "adapter"))
    assert lost["effect"] < 0.95
    assert (lost["passed"], lost["wrong_values"], kept["passed"]) == (False, 0, True)
    assert certificate["recommended"] == "adapter"
    with pytest.raises(GateMissed, match=r"merged: effect .*certify.min_effect.merged.*unmerged"):
        refuse_if_missed(certificate)


def test_stochastic_rounding_is_held_to_both_neighbours(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    merge(tiny_base, tiny_adapter, tmp_path / "merged", settings=Merge(rounding="stochastic"))

    def wrong(rounding: str) -> Any:
        certificate = measure(tiny_base, tiny_adapter, tmp_path / "merged", rounding=rounding)
        return certificate["artefacts"]["merged"]["wrong_values"]

    assert wrong("stochastic") == 0
    assert wrong("nearest") > 1000, "nearest is another rule"
    weights = load_file(tmp_path / "merged" / SINGLE)
    weights[UP].view(torch.int16)[3, 5] += 2
    weights["model.norm.weight"].view(torch.int16)[3] += 1  # not an adapted one: never rounded
    save_file(weights, tmp_path / "merged" / SINGLE, metadata={"format": "pt"})
    assert wrong("stochastic") == 2


def test_a_value_that_needs_no_rounding_has_no_second_neighbour(
    tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "zero", b_scale=0)
    merge(tiny_base, adapter, tmp_path / "merged", settings=Merge(rounding="stochastic"))
    harmed = planted(one_value_off_by_one_step, tmp_path / "merged", tiny_base, tmp_path)
    certificate = measure(tiny_base, adapter, harmed, rounding="stochastic")
    assert certificate["artefacts"]["merged"]["wrong_values"] == 1


def test_an_adapter_on_the_original_base_is_checked_there_and_measured_against_training(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    merge(tiny_base, tiny_adapter, tmp_path / "merged", "qlora", Merge(onto="original"))
    certificate = measure(tiny_base, tiny_adapter, tmp_path / "merged", "qlora", onto="original")
    artefact = certificate["artefacts"]["merged"]
    assert artefact["wrong_values"] == 0
    assert artefact["mean_kl"] > 1e-4, "the error of 4 bit, which the adapter had learnt to bear"
    assert "float32_max_logit_error" not in artefact


@pytest.mark.parametrize(
    "kind",
    [
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"k_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5, 258]},
        {"use_dora": True},
    ],
    ids=lambda kind: next(iter(kind)),
)
def test_whatever_peft_can_put_into_an_adapter_is_checked(
    tiny_base: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", b_scale=0.02, **kind)
    merge(tiny_base, adapter, tmp_path / "merged")
    assert measure(tiny_base, adapter, tmp_path / "merged")["passed"]
    plain = make_adapter(tiny_base, tmp_path / "plain", b_scale=0.02)
    refused(measure(tiny_base, plain, tmp_path / "merged"))


def refused(certificate: dict[str, Any]) -> None:
    artefact = certificate["artefacts"]["merged"]
    assert artefact["wrong_values"] > 0
    assert not artefact["passed"]
    assert not certificate["passed"]
    with pytest.raises(GateMissed, match=r"^not certified: merged: .*[1-9]\d* wrong values"):
        refuse_if_missed(certificate)


def transposed(weights: Weights, base: Weights, _: Path) -> None:
    for name in (KEY, KEY.replace("k_proj", "v_proj")):  # the square ones: B A the other way round
        weights[name] = base[name] + (weights[name] - base[name]).T.contiguous()


def without_a_layer(weights: Weights, base: Weights, _: Path) -> None:
    for name in [name for name in weights if ".layers.1." in name]:
        weights[name] = base[name]


def of_twice_the_scale(weights: Weights, base: Weights, _: Path) -> None:
    for name in weights:
        weights[name] = (2 * weights[name].float() - base[name].float()).bfloat16()


def of_another_scale(weights: Weights, base: Weights, _: Path) -> None:
    """That of r / alpha."""
    for name in weights:
        change = weights[name].float() - base[name].float()
        weights[name] = (base[name].float() + change / 9).bfloat16()


def of_another_base(weights: Weights, base: Weights, _: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in weights if "proj" in name]:
        other = base[name].float().std() * torch.randn(base[name].shape, generator=generator)
        weights[name] = (weights[name].float() - base[name].float() + other).bfloat16()


def in_4_bit_again(weights: Weights, _: Weights, base: Path) -> None:
    for name in quantised_weights(base):
        weights[name] = as_trained(weights[name]).bfloat16()


FAULTS = [
    transposed, without_a_layer, of_twice_the_scale, of_another_scale, of_another_base,
    in_4_bit_again,
]  # fmt: skip


def planted(
    plant: Callable[[Weights, Weights, Path], None], merged: Path, base: Path, folder: Path
) -> Path:
    harmed = Path(shutil.copytree(merged, folder / "harmed"))
    weights = load_file(harmed / SINGLE)
    plant(weights, load_file(base / SINGLE), base)
    save_file(weights, harmed / SINGLE, metadata={"format": "pt"})
    return harmed


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_is_seen_in_the_weights_and_in_what_the_model_says(
    tiny_base: Path,
    tiny_adapter: Path,
    merged: Path,
    tmp_path: Path,
    plant: Callable[[Weights, Weights, Path], None],
) -> None:
    harmed = planted(plant, merged, tiny_base, tmp_path)
    certificate = measure(tiny_base, tiny_adapter, harmed)
    refused(certificate)
    told = certificate["artefacts"]["merged"]["missed"]
    assert any("certify.min_effect.merged" in fault for fault in told)


def one_value_off_by_one_step(weights: Weights, _: Weights, __: Path) -> None:
    weights[UP].view(torch.int16)[3, 5] += 1


def changed_beside_the_adapter(weights: Weights, _: Weights, __: Path) -> None:
    weights["model.norm.weight"].view(torch.int16)[3] += 1


@pytest.mark.parametrize("plant", [one_value_off_by_one_step, changed_beside_the_adapter])
def test_a_single_value_is_seen_in_the_weights(
    tiny_base: Path, tiny_adapter: Path, merged: Path, tmp_path: Path, plant: Any
) -> None:
    certificate = measure(
        tiny_base, tiny_adapter, planted(plant, merged, tiny_base, tmp_path), "lora"
    )
    assert certificate["artefacts"]["merged"]["wrong_values"] == 1
    refused(certificate)


def test_a_merge_by_another_scale_in_the_configuration_is_not_certified(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    doubled = Path(shutil.copytree(tiny_adapter, tmp_path / "doubled"))
    config = json.loads((doubled / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (doubled / "adapter_config.json").write_text(json.dumps(config))
    merge(tiny_base, doubled, tmp_path / "merged")
    refused(measure(tiny_base, tiny_adapter, tmp_path / "merged"))


def test_a_qlora_adapter_merged_into_the_unquantised_base_is_not_certified(
    tiny_base: Path, tiny_adapter: Path, merged: Path
) -> None:
    refused(measure(tiny_base, tiny_adapter, merged, "qlora"))


@pytest.mark.parametrize("change", ["gone", "turned"])
def test_a_checkpoint_of_other_tensors_cannot_be_certified(
    tiny_base: Path, tiny_adapter: Path, merged: Path, tmp_path: Path, change: str
) -> None:
    def plant(weights: Weights, _: Weights, __: Path) -> None:
        values = weights.pop(UP)
        if change == "turned":
            weights[UP] = values.T.contiguous()

    other = planted(plant, merged, tiny_base, tmp_path)
    with pytest.raises(RunError, match="does not hold the same tensors as"):
        measure(tiny_base, tiny_adapter, other)


def test_an_adapter_of_another_base_is_one_sentence(
    tiny_base: Path, tiny_adapter: Path, merged: Path, tmp_path: Path
) -> None:
    wider = Path(shutil.copytree(tiny_adapter, tmp_path / "wider"))
    factors = load_file(wider / "adapter_model.safetensors")
    factors = {name: torch.cat([f, f], dim=1) for name, f in factors.items() if "lora_A" in name}
    save_file(factors, wider / "adapter_model.safetensors")
    with pytest.raises(RunError, match=r"wider was not made for .*size mismatch"):
        measure(tiny_base, wider, merged)


def test_fewer_tokens_than_wanted_are_told(
    tiny_base: Path, tiny_adapter: Path, merged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measure(tiny_base, tiny_adapter, merged)
    told = "only 156 direct, 156 thinking held-out tokens to compare on, 400 are wanted"
    assert [record.message for record in caplog.records if "wanted" in record.message] == [told]
    with pytest.raises(RunError, match="there is no held-out token"):
        certify(Trained(tiny_base, tiny_adapter, "lora"), {}, [], SETTINGS, merged / "log")


def test_a_mode_of_which_nothing_is_held_out_is_told(
    tiny_base: Path, tiny_adapter: Path, merged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = Trained(tiny_base, tiny_adapter, "lora")
    certificate = certify(trained, {"merged": merged}, ROWS[:3], SETTINGS, merged / "log")
    assert certificate["artefacts"]["merged"]["by_mode"].keys() == {"direct"}
    assert "no held-out token is of mode thinking, of which nothing is proved" in caplog.text
    caplog.clear()
    measure(tiny_base, tiny_adapter, merged)
    assert "nothing is proved" not in caplog.text


@pytest.mark.parametrize(
    ("free", "device"), [(None, "cpu"), (0, "cpu"), (1250, "cpu"), (1251, "cuda")]
)
def test_a_model_goes_to_the_gpu_only_where_it_fits_with_room(
    free: int | None, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert choose_device(1000, free) == device
    falls_back = free is not None and device == "cpu"
    assert ("comparing on the CPU: it takes 0.0 GB" in caplog.text) == falls_back
