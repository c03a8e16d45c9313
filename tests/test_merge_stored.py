"""How merged values are stored: which dtype, how rounded, and what the files beside them say."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters import make_adapter
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.base.checkpoint import INDEX, SINGLE
from pipeline.base.nf4 import as_trained, quantised_weights
from pipeline.errors import RunError
from pipeline.merge import merge
from pipeline.merge import weights as merged_weights
from pipeline.merge.weights import round_stochastically
from pipeline.recipe import Merge

STOCHASTIC = Merge(rounding="stochastic")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: values for part in found for name, values in part.items()}


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.floats(-(2.0**127), 2.0**127, width=32), st.integers(0, 1000))
def test_a_value_becomes_one_of_its_two_neighbours_and_itself_if_it_is_one(
    value: float, seed: int
) -> None:
    exact = torch.full((64,), value)
    below = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32)  # towards zero
    above = (below.view(torch.int32) + (1 << 16)).view(torch.float32)
    found = round_stochastically(exact, draws(seed)).float()
    if torch.equal(exact.bfloat16().float(), exact):
        assert torch.equal(found, exact)
    assert ((found == below) | (found == above)).all()


@pytest.mark.parametrize("value", [1.001, 1.0035, -1.005, 3e-39, -2.5e20])
def test_the_mean_of_many_is_the_value_itself(value: float) -> None:
    """Within five standard deviations; of nearest rounding it is off by far more."""
    num = 1 << 18
    exact = torch.full((num,), value)
    found = round_stochastically(exact, draws()).double()
    step = float(found.max() - found.min())
    share = (
        abs(float(exact[0].double()) - float(found.abs().min()) * (1 if value > 0 else -1)) / step
    )
    assert 0.05 < share < 0.95, "the value is too near to a neighbour to tell"
    deviation = step * (share * (1 - share) / num) ** 0.5
    error = abs(float(found.mean()) - float(exact[0].double()))
    assert error < 5 * deviation
    assert abs(float(exact[:1].bfloat16().double()) - float(exact[0].double())) > 10 * error


def test_a_merge_is_rounded_alike_however_it_is_cut_and_otherwise_by_another_seed(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(tiny_base, tiny_adapter, tmp_path / "one", settings=STOCHASTIC)
    merge(tiny_base, tiny_adapter, tmp_path / "other", settings=STOCHASTIC, seed=1)
    monkeypatch.setattr(merged_weights, "_BLOCK_VALUES", 100)
    merge(tiny_base, tiny_adapter, tmp_path / "cut", settings=STOCHASTIC)
    one, cut, other = (weights_of(tmp_path / name) for name in ("one", "cut", "other"))
    assert all(torch.equal(values, cut[name]) for name, values in one.items())
    for name in quantised_weights(tiny_base):
        assert not torch.equal(one[name], other[name])
    numbers = [
        torch.rand(64, generator=merged_weights._generator(name, 0)) for name in ("a", "b", "a")
    ]
    assert torch.equal(numbers[0], numbers[2])
    assert not torch.equal(numbers[0], numbers[1]), "two weights get the same random numbers"


def test_stochastic_rounding_leaves_float32_and_what_is_bfloat16_already(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    merge(tiny_base, tiny_adapter, tmp_path / "exact", settings=Merge(dtype="float32"))
    both = Merge(dtype="float32", rounding="stochastic")
    merge(tiny_base, tiny_adapter, tmp_path / "same", settings=both)
    zeros = make_adapter(tiny_base, tmp_path / "zeros", b_scale=0.0)
    merge(tiny_base, zeros, tmp_path / "base", settings=STOCHASTIC)
    assert (tmp_path / "same" / SINGLE).read_bytes() == (tmp_path / "exact" / SINGLE).read_bytes()
    base = weights_of(tiny_base)
    assert all(torch.equal(v, base[n]) for n, v in weights_of(tmp_path / "base").items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_index_and_configuration_say_what_was_written(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, dtype: str
) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(sharded, max_shard_size="100KB")
    settings = Merge.model_validate({"dtype": dtype})
    merge(sharded, tiny_adapter, tmp_path / "merged", settings=settings)

    before = json.loads((sharded / INDEX).read_text())
    index = json.loads((tmp_path / "merged" / INDEX).read_text())
    stored = weights_of(tmp_path / "merged")
    total = sum(values.nbytes for values in stored.values())
    assert index == {**before, "metadata": {**before["metadata"], "total_size": total}}
    assert (total != before["metadata"]["total_size"]) == (dtype == "float32")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    for name, values in model.state_dict().items():
        assert torch.equal(values.float(), stored[name].float()), "loading it rounds again"


@pytest.mark.parametrize("held", [torch.float16, torch.float32])
def test_of_a_base_in_another_dtype_the_configuration_names_one_that_holds_both(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, held: torch.dtype
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=held).save_pretrained(base)
    merge(base, tiny_adapter, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_a_qlora_adapter_goes_onto_the_original_weights_on_request_with_its_error(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = Merge(dtype="float32", onto="original")
    with caplog.at_level(logging.INFO):
        merge(tiny_base, tiny_adapter, tmp_path / "merged", "qlora", original)
    merge(tiny_base, tiny_adapter, tmp_path / "plain", settings=Merge(dtype="float32"))
    assert (tmp_path / "merged" / SINGLE).read_bytes() == (tmp_path / "plain" / SINGLE).read_bytes()

    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), str(tiny_adapter)
    ).merge_and_unload()
    after, before = adapted.state_dict(), weights_of(tiny_base)
    names = quantised_weights(tiny_base)
    rounding = torch.cat([(as_trained(before[n]).float() - before[n]).flatten() for n in names])
    change = torch.cat([(after[n] - before[n].float()).flatten() for n in names])
    rms = [float(moved.square().mean().sqrt()) for moved in (rounding, change)]
    (said,) = [r.getMessage() for r in caplog.records if "onto the original" in r.getMessage()]
    assert said == (
        f"onto the original weights, which 4 bit moves by {rms[0]:.2g} in the mean and "
        f"{float(rounding.abs().max()):.2g} at most, and the adapter by {rms[1]:.2g} and "
        f"{float(change.abs().max()):.2g}: the error is {rms[0] / rms[1]:.2g} times the adapter's "
        "own change"
    )


def test_a_disk_too_small_is_told_before_that_error_is_measured(
    tiny_base: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"merged needs 0\.0 GB and the disk has 0\.0 GB free"):
        merge(tiny_base, tiny_adapter, tmp_path / "merged", "qlora", Merge(onto="original"))
    assert "onto the original" not in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38])
def test_values_that_cannot_be_stored_are_refused_and_nothing_is_left(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, value: float
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = value
    model.save_pretrained(base)
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.up_proj\.weight becomes values that are"):
        merge(base, tiny_adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
