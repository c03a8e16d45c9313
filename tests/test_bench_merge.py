"""The merge benchmark: each way writes the base again, and is measured by itself."""

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.bench import merge as bench
from pipeline.bench.measure import measure, read_high_water
from pipeline.bench.merge import Timing, bench_merge, table, write_adapter
from pipeline.bench.peft_merge import merge_by_peft
from pipeline.errors import PipelineError
from pipeline.merge import merge


def test_the_adapter_is_on_every_linear_layer_and_both_merges_agree_on_it(
    tiny_base: Path, tmp_path: Path
) -> None:
    write_adapter(tiny_base, 4, tmp_path / "adapter")
    merge(tiny_base, tmp_path / "adapter", tmp_path / "ours")
    merge_by_peft(tiny_base, tmp_path / "adapter", tmp_path / "theirs")

    base = load_file(tiny_base / "model.safetensors")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    linear = {name for name in base if name.endswith("_proj.weight")}
    assert {name for name in base if not torch.equal(base[name], ours[name])} == linear
    for name in base:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.02, atol=1e-3)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    (config,) = PeftModel.from_pretrained(model, tmp_path / "adapter").peft_config.values()
    assert config.r == 4


@pytest.mark.slow
def test_every_way_is_measured_and_nothing_stays(tiny_base: Path, tmp_path: Path) -> None:
    timings = bench_merge(tiny_base, 4, tmp_path)

    assert [timing.what for timing in timings] == [
        "a copy, with fsync",
        "its sha256, once for a run",
        "ours",
        "ours, over the base in 4 bit",
        "PEFT's merge_and_unload",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"bench-merge.json"}
    weights = (tiny_base / "model.safetensors").stat().st_size
    copy, hashes, *others = timings
    assert all(weights <= timing.disk_bytes < 2 * weights for timing in (copy, *others))
    assert hashes.disk_bytes < 10_000
    assert all(timing.peak_bytes > 5 * copy.peak_bytes for timing in others), "these load torch"


def test_what_does_not_fit_peft_has_a_smaller_shape_beside_it(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def note(what: str, command: list[str], base: Path, out: Path) -> Timing:
        asked.append((base.name, what.partition(",")[0]))
        return Timing(base.name, 1, what, 1.0, 1, 1)

    def make(folder: Path, shape: str) -> None:
        bench.shutil.copytree(tiny_base, folder)

    monkeypatch.setattr(bench, "_measure", note)
    monkeypatch.setattr(bench, "make_random", make)
    monkeypatch.setattr(bench, "count_bytes", lambda _: 10**15)
    with pytest.raises(PipelineError, match=r"needs 1050000\.0 GB and"):
        bench_merge(tiny_base, 4, tmp_path)

    free = bench.shutil.disk_usage(tmp_path)._replace(free=2 * 10**15)
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda _: free)
    bench_merge(tiny_base, 4, tmp_path / "again")

    shape = asked[4][0]
    whats = ["a copy", "its sha256", "ours", "ours"]
    assert asked[:4] == [("tiny", what) for what in whats]
    assert asked[4:8] == [(shape, what) for what in whats]
    assert asked[-1] == (shape, "PEFT's merge_and_unload")
    assert shape.startswith("qwen3-")
    assert not (tmp_path / "again" / shape).exists()


@pytest.mark.parametrize(
    ("gigabytes", "shape"), [(12, "qwen3-4b"), (21, "qwen3-8b"), (10, "qwen3-1.7b")]
)
def test_the_largest_shape_that_fits_is_taken(gigabytes: int, shape: str) -> None:
    assert bench._choose_shape(gigabytes * 10**9) == shape


def test_a_processs_high_water_mark_is_its_own(tmp_path: Path) -> None:
    def run(mebibytes: int) -> float:
        hold = f"import time; held = b'x' * ({mebibytes} << 20); del held; time.sleep(0.3)"
        return measure([sys.executable, "-c", hold], tmp_path, {}, read_high_water).peak_mib

    assert 190 < run(200) - run(0) < 210


def test_the_table_compares_with_the_copy_of_the_same_base() -> None:
    lines = table(
        [
            Timing("large", 16 * 10**9, "a copy, with fsync", 20.0, 1 << 24, 16 * 10**9),
            Timing("large", 16 * 10**9, "ours", 50.0, 3 << 30, 16 * 10**9),
            Timing("small", 8 * 10**9, "a copy, with fsync", 5.0, 1 << 24, 8 * 10**9),
            Timing("small", 8 * 10**9, "ours", 10.0, 1 << 30, 8 * 10**9),
        ]
    ).splitlines()

    assert lines[3] == "| large | 16.00 | ours | 50.0 | 2.50 | 3.00 | 16.00 |"
    assert lines[5] == "| small | 8.00 | ours | 10.0 | 2.00 | 1.00 | 8.00 |"
    assert lines[-1].startswith("Measured on ")
