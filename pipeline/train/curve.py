"""The course of a training as a picture, from its metrics.jsonl."""

import json
import logging
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

log = logging.getLogger(__name__)
SMOOTHING = 0.9
DRAWN = {
    "sft": ("loss", "nats a supervised token"),
    "dpo": ("loss", "nats a pair"),
    "kto": ("loss", "a pair's mean"),
    "grpo": ("reward", "a reply's mean"),  # its loss stays about 0
}


def draw_curve(metrics: Path, picture: Path, objective: str = "sft") -> None:
    """Draw what a metrics.jsonl says as a PNG, unless it says less than two steps.

    A training is not lost with its picture: one that cannot be written is told in the log.
    """
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if len(lines) < 2:
        picture.unlink(missing_ok=True)  # of an earlier training
        return
    temporary = picture.with_name(picture.name + ".partial")
    try:
        plot(lines, *DRAWN[objective]).savefig(temporary, format="png", dpi=150)
        temporary.replace(picture)
    except OSError as error:
        log.warning("%s cannot be written: %s", picture, error.strerror)


def smooth(values: list[float], weight: float = SMOOTHING) -> list[float]:
    """An exponential moving average that does not lean to 0 at its beginning.

    It is divided by what the weights so far add up to, as Adam does with its moments (Kingma and
    Ba 2015, section 3).
    """
    smoothed, mean = [], 0.0
    for index, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**index))
    return smoothed


def plot(lines: list[dict[str, Any]], key: str, unit: str) -> Figure:
    """Loss or reward of each step, smoothed, held out, and the learning rate against the step."""
    steps = [line["step"] for line in lines]
    values = [line[key] for line in lines]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    rates = axes.twinx()
    rates.plot(steps, [line["learning_rate"] for line in lines], color="0.6", ls=":", lw=1)
    rates.set(ylabel="learning rate (dotted)", ylim=(0, None))
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.plot(steps, values, color="C0", lw=0.6, alpha=0.5, label="each step")
    axes.plot(steps, smooth(values), color="C0", lw=2, label="smoothed")
    measured = [line for line in lines if "held_out_loss" in line]
    if measured:
        held_out = [line["held_out_loss"] for line in measured]
        axes.plot([line["step"] for line in measured], held_out, "o-", color="C1", label="held out")
    axes.set(xlabel="optimizer step", ylabel=f"{key} ({unit})")
    axes.set_zorder(rates.get_zorder() + 1)  # the values over the rates
    axes.patch.set_visible(False)
    axes.legend()
    return figure
