"""TRL's own preparation of a file of conversations, as its documentation has it; run as a child.

`python -m pipeline.bench.trl_data FILE TOKENIZER_FOLDER NUM_PROC` prints one line of JSON;
NUM_PROC is `dataset_num_proc`, and 0 leaves it at TRL's default.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer


@dataclass(frozen=True)
class Prepared:
    """What TRL would train on, and how long it took to get there."""

    rows: Dataset
    read_seconds: float
    """From the file to prompts and completions."""
    prepare_seconds: float
    """From there to token ids and labels: SFTTrainer's constructor."""


def prepare(conversations: Path, tokenizer_folder: Path, num_proc: int | None) -> Prepared:
    """Read a JSONL file of single-turn conversations and have SFTTrainer prepare it.

    As prompt and completion, the form in which TRL trains the answer alone, with the switch that
    makes the empty think block a part of the prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    start = time.perf_counter()
    loaded = load_dataset("json", data_files=str(conversations), split="train")
    rows = loaded.map(_split, remove_columns=["messages"], num_proc=num_proc)
    read_seconds = time.perf_counter() - start
    model = _smallest_model(len(tokenizer))
    with TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out,
            max_length=4096,
            dataset_num_proc=num_proc,
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        start = time.perf_counter()
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        prepare_seconds = time.perf_counter() - start
    return Prepared(trainer.train_dataset, read_seconds, prepare_seconds)


def _split(row: dict[str, Any]) -> dict[str, Any]:
    *prompt, answer = row["messages"]
    direct = {"enable_thinking": False}
    return {"prompt": prompt, "completion": [answer], "chat_template_kwargs": direct}


def _smallest_model(vocab_size: int) -> Qwen3ForCausalLM:
    """The trainer wants a model, though its data do not depend on one."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def main(conversations: str, tokenizer_folder: str, num_proc: str) -> None:
    """Prepare and print how it went."""
    prepared = prepare(Path(conversations), Path(tokenizer_folder), int(num_proc) or None)
    line = {
        "rows": len(prepared.rows),
        "read_seconds": prepared.read_seconds,
        "prepare_seconds": prepared.prepare_seconds,
    }
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
