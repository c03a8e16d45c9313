"""A plan, for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.recipe import Gpu

LINES = {
    "weights": "weights",
    "adapter": "adapter",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "activations": "activations",
    "logits": "logits",
    "mask": "mask",
    "fixed": "context, libraries, kernels",
    "peak": "peak",
}
ROUGH = {
    "dpo": "rough: two replies a pair, and a pass through the base for reference",
    "kto": "rough: two replies a pair, and passes through the base for reference",
    "grpo": "rough: every reply taken to be as long as it may, without caches while they are made",
}


def plan_tables(predicted: Mapping[str, Any]) -> list[Table | Text]:
    """What `pipeline plan` tells, in the order to print it; what to change comes last."""
    return [_memory_table(predicted), _run_table(predicted), _verdict(predicted)]


def gpu_table(gpus: Mapping[str, Gpu]) -> Table:
    """The GPUs a plan may be made for."""
    table = _table("GPUs (--gpu)")
    for column in ("", "memory GB", "dense bf16 TFLOP/s", "GB/s", "USD/h"):
        table.add_column(column, justify="right" if column else "left")
    for name, gpu in gpus.items():
        cells = (gpu.memory_gb, gpu.bf16_tflops, gpu.bandwidth_gbs)
        table.add_row(name, *(f"{cell:,.0f}" for cell in cells), f"{gpu.usd_per_hour:.2f}")
    return table


def _memory_table(predicted: Mapping[str, Any]) -> Table:
    sharded = predicted["sharded_bytes"]
    table = _table("Memory of each device, predicted, GB")
    table.add_column()
    for column in ("", "with FSDP2") if sharded else ("",):
        table.add_column(column, justify="right")
    columns = [predicted["memory_bytes"], *([sharded] if sharded else [])]
    for key, words in LINES.items():
        cells = [f"{column[key] / 1e9:,.2f}" for column in columns]
        table.add_row(words, *cells, style="bold" if key == "peak" else "")
    return table


def _run_table(predicted: Mapping[str, Any]) -> Table:
    table = _table("The run, predicted")
    table.show_header = False
    table.add_column()
    table.add_column()
    for words, value in _facts(predicted):
        table.add_row(words, value)
    return table


def _facts(predicted: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    machine, settings = predicted["machine"], predicted["settings"]
    flat, shared = predicted["row_tokens_per_epoch"], predicted["tokens_per_epoch"]
    seconds, usd = predicted["seconds"], predicted["usd"]
    facts = [
        ("machine", f"{machine['devices']} x {machine['name']}"),
        ("base", f"{predicted['parameters']['base']:,} weights"),
        ("trained", f"{predicted['parameters']['trained']:,} weights"),
        ("tokens an epoch", f"{shared:,} ({flat:,} without sharing)"),
        ("supervised", f"{predicted['supervised_tokens_per_epoch']:,}"),
        ("steps", f"{predicted['steps']:,} of {predicted['tokens_per_step']:,} tokens"),
        ("at once", f"{predicted['held_tokens']:,} tokens of at most {settings['micro_tokens']:,}"),
        ("checkpointing", settings["checkpointing"]),
        ("operations", f"{predicted['operations']:.3g}"),
        ("time", describe_seconds(seconds) if seconds is not None else "rates are unknown"),
    ]
    if usd is not None:
        facts.append(("cost", f"{usd:,.2f} USD"))
    most = predicted["largest_micro_tokens"].items()
    told = [f"{tokens:,} with {word}" if tokens else f"none with {word}" for word, tokens in most]
    facts.append(("largest micro-batch", "tokens by checkpointing: " + ", ".join(told)))
    if predicted["objective"] in ROUGH:
        facts.append(("how sure", ROUGH[predicted["objective"]]))
    return facts


def _verdict(predicted: Mapping[str, Any]) -> Text:
    machine = predicted["machine"]
    room = f"{machine['memory_bytes'] / 1e9:,.1f} GB of {machine['name']}"
    peak = predicted["memory_bytes"]["peak"] / 1e9
    if predicted["fits"]:
        return Text(f"\nfits: {peak:,.1f} of {room}", "green")
    text = Text(f"\ndoes not fit: {peak:,.1f} GB, and there are {room}", "bold red")
    for number, change in enumerate(predicted["changes"]):
        begins = "the smallest change" if number == 0 else "or"
        text.append(f"\n  {begins}: {change['set']} ({change['peak_bytes'] / 1e9:,.1f} GB)", "red")
    if not predicted["changes"]:
        text.append("\n  nothing in a recipe changes that; take a smaller base", "red")
    return text


def describe_seconds(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is readable."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def _table(title: str) -> Table:
    return Table(
        title=Text(f"\n{title}", "bold"),
        title_justify="left",
        box=None,
        padding=(0, 0, 0, 2),
        header_style="dim",
    )
