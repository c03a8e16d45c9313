"""One training of the benchmark, run as a child: ours, or stock TRL on the same rows unrolled.

`python -m pipeline.bench.fit KIND BASE ROWS SETTINGS` prints one line of JSON. KIND is `tree` or
`none`, our packings, or `padded`, `equal` or `bfd`, TRL's: as many rows at once as MICRO_ROWS, as
fit `micro_tokens`, or as are packed; SETTINGS is a recipe's `train` section as JSON.
"""

import json
import logging
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from pipeline.recipe import Train
from pipeline.train.model import keep_adapter_in_float32, load_base, with_adapter
from pipeline.train.stage import train
from pipeline.tree import IGNORED

MICRO_ROWS = 4
"""Rows that TRL pads to one length; the step is its own, of batch_rows rows, all the same."""


def fit_ours(packing: str, base: Path, rows: Path, settings: Train) -> dict[str, float]:
    """Train with the train stage; what its metrics.jsonl says, summed up."""
    with TemporaryDirectory() as out:
        begin = time.perf_counter()
        chosen = settings.model_copy(update={"packing": packing})
        measured = train(chosen, base, rows, Path(out))
        took = time.perf_counter() - begin
        metrics = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in metrics.splitlines()]
    supervised = sum(line["num_supervised_tokens"] for line in lines)
    return {
        "steps": len(lines),
        "seconds": measured["seconds"],
        "first_step_seconds": took - measured["seconds"] + lines[0]["seconds"],
        "later_seconds": sum(line["seconds"] for line in lines[1:]),
        "gpu_bytes": _gpu_bytes(),
        "supervised_tokens": supervised,
        "tokens": sum(line["num_tokens"] for line in lines),
        "loss": sum(x["loss"] * x["num_supervised_tokens"] for x in lines) / supervised,
    }


def _gpu_bytes() -> int:
    """The most a GPU has held; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


class _Watch(TrainerCallback):
    """When training and its first step began and ended, and the losses it logged."""

    def __init__(self) -> None:
        self.began = self.first = self.ended = 0.0
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else this is when the step was asked for
        self.ended = time.perf_counter()
        self.first = self.first or self.ended

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def fit_trl(packing: str, base: Path, rows: Path, settings: Train) -> dict[str, float]:
    """Train with stock SFTTrainer on input_ids and labels for an epoch, as its documentation says.

    Only the base is loaded by us, in the dtype of `settings`: TRL would hold it in float32.
    """
    begin = time.perf_counter()
    is_packed = packing == "bfd"
    model = with_adapter(load_base(base, settings), settings)
    model.set_attn_implementation("sdpa")  # what transformers chooses by itself
    table = Dataset.from_file(str(rows)).map(_label).select_columns(["input_ids", "labels"])
    longest, micro_tokens = max(map(len, table["input_ids"])), int(settings.micro_tokens)
    equal = min(settings.batch_rows, max(1, micro_tokens // longest))
    micro_rows = {"bfd": 1, "padded": MICRO_ROWS, "equal": equal}[packing]
    with TemporaryDirectory() as out:
        arguments = SFTConfig(
            output_dir=out,
            num_train_epochs=1,
            packing=is_packed,
            max_length=max(micro_tokens, longest),  # it would cut longer ones
            per_device_train_batch_size=micro_rows,
            gradient_accumulation_steps=1 if is_packed else settings.batch_rows // micro_rows,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.schedule,
            seed=settings.seed,
            bf16=settings.dtype == "bfloat16",
            activation_checkpointing=settings.checkpointing == "full",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        watch = _Watch()
        tokenizer = AutoTokenizer.from_pretrained(base)
        trainer = SFTTrainer(model, arguments, train_dataset=table, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        keep_adapter_in_float32(model)
        trainer.train()
    return {
        "steps": len(watch.losses),
        "seconds": watch.ended - watch.began,
        "first_step_seconds": watch.first - begin,
        "later_seconds": watch.ended - watch.first,
        "gpu_bytes": _gpu_bytes(),
        "supervised_tokens": sum(x != IGNORED for labels in table["labels"] for x in labels),
        "tokens": sum(map(len, table["input_ids"])),
        "loss": sum(watch.losses) / len(watch.losses),
    }


def _label(row: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def main(kind: str, base: str, rows: str, settings: str) -> None:
    """Train and print how it went."""
    logging.disable(logging.WARNING)
    chosen = Train.model_validate(json.loads(settings))
    fit = fit_ours if kind in ("tree", "none") else fit_trl
    sys.stdout.write(json.dumps(fit(kind, Path(base), Path(rows), chosen)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
