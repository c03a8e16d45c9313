"""A merge holds a block of its base, never the whole of a large tensor, and maps no file."""

import os
import sys
from pathlib import Path

import pytest
from adapters import make_adapter
from transformers import AutoModelForCausalLM, Qwen3Config

from pipeline.bench.measure import measure, read_high_water

MIB = 1 << 20


@pytest.fixture(scope="module")
def tall(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base like `tiny` whose largest weights take 256 MiB each in float32."""
    config = Qwen3Config.from_pretrained(tiny_base, intermediate_size=1 << 20, num_hidden_layers=1)
    config.layer_types = config.layer_types[:1]
    folder = tmp_path_factory.mktemp("bases") / "tall"
    AutoModelForCausalLM.from_config(config, dtype="bfloat16").save_pretrained(folder)
    return folder


def peak(base: Path, folder: Path, *options: str) -> int:
    """The most bytes a merge of an adapter on `up_proj` holds, the files it maps among them."""
    adapter = make_adapter(base, folder / f"{base.name}-adapter", target_modules=["up_proj"], r=1)
    paths = [str(adapter), "--base", str(base), "--out", str(folder / f"{base.name}-merged")]
    command = [sys.executable, "-m", "pipeline", "merge", *paths, *options]
    return round(measure(command, folder, os.environ, read_high_water).peak_mib * MIB)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "most"),
    # bitsandbytes takes 16 float32 for each value of a block, some of them twice
    [((), 128 * MIB), (("--trained-on", "nf4"), 384 * MIB)],
    ids=["as it is", "in 4 bit"],
)
def test_a_larger_base_takes_no_more_than_a_block(
    tiny_base: Path, tall: Path, tmp_path: Path, options: tuple[str, ...], most: int
) -> None:
    assert peak(tall, tmp_path, *options) - peak(tiny_base, tmp_path, *options) < most
