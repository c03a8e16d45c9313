"""The benchmark of engines, whole, over a tiny model."""

import json
from pathlib import Path

import pytest

from pipeline.bench.engine import RESULT, bench_engine, table


@pytest.mark.slow
def test_both_sides_take_turns_and_a_second_phase_computes_its_tail_alone(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    result = bench_engine(tiny_gguf, "llamacpp", [1, 2], 8, tmp_path)

    assert [rate.streams for rate in result.rates] == [1, 2]
    assert all(rate.alone > 0 and rate.ours > 0 for rate in result.rates)
    phase = result.second_phase
    assert 0 < phase.computed_tokens < phase.prompt_tokens / 2
    written = json.loads((tmp_path / RESULT).read_text(encoding="utf-8"))
    assert written["rates"][1]["streams"] == 2
    lines = table(result).splitlines()
    assert lines[0].startswith("| streams |")
    assert len([line for line in lines if line.startswith("|")]) == 4
