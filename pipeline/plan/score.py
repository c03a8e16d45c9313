"""A prediction beside what was measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.plan.memory import GPU_BYTES


def measure(measured: Mapping[str, Any], metrics: Path) -> dict[str, Any]:
    """What a run measured, with the tokens and the median seconds of a step from its metrics."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "num_tokens" in line and "seconds" in line]
    if not steps:
        return dict(measured)
    # The first step of a process also pays for what is loaded and compiled late.
    seconds = [line["seconds"] for line in steps[1:] or steps]
    tokens = sum(line["num_tokens"] for line in steps)
    return {**measured, "seconds_per_step": median(seconds), "tokens": tokens}


def compare(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, float]:
    """Measured over predicted: of the peak, the seconds a step, and the run's tokens.

    On a GPU what is measured is torch's own, without the driver's context and workspaces.
    """
    peak = predicted["memory_bytes"]["peak"]
    if predicted["machine"]["name"] != "CPU":
        peak -= int(GPU_BYTES)
    pairs = {
        "peak_bytes": peak,
        "seconds_per_step": predicted["seconds_per_step"],
        "tokens": predicted["tokens_per_step"] * predicted["steps"],
    }
    return {
        key: round(measured[key] / expected, 3)
        for key, expected in pairs.items()
        if expected and measured.get(key)
    }


def tell(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """The same in one line."""
    ratios = compare(predicted, measured)
    words = {"peak_bytes": "peak memory", "seconds_per_step": "seconds a step", "tokens": "tokens"}
    values = {"peak_bytes": 1e9, "seconds_per_step": 1.0, "tokens": 1.0}
    units = {"peak_bytes": "{:.2f} GB", "seconds_per_step": "{:.3g}", "tokens": "{:,.0f}"}
    told = [
        f"{words[key]} {units[key].format(measured[key] / values[key])} ({ratio:.2f} of the plan)"
        for key, ratio in ratios.items()
    ]
    return ", ".join(told)
