"""Memory, tokens and operations before a GPU is rented: from a config and counts, no weights."""

import json
import math
from pathlib import Path
from typing import Any

from pipeline.recipe import Train

BYTES = {"bfloat16": 2.0, "float32": 4.0}
# NF4 with double quantisation: 4 bit a value, 8 bit a block of 64 for its absmax, and float32
# scales for blocks of 256 of these (Dettmers et al. 2023, QLoRA, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAM_BYTES = 4 + 4 + 4 + 4
"""A trained float32 value: itself, its gradient and Adam's two moments."""


def predict(settings: Train, base: Path, counts: dict[str, int]) -> dict[str, Any]:
    """What a run will hold, in bytes, and compute, predicted from shapes and the rows' counts.

    Operations are LoRA's own count: a forward pass and the gradient of activations, none of the
    frozen weights, so 4 per weight and token, and 6 with checkpointing's second forward pass.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    shapes, layers = _linear_shapes(config), config["num_hidden_layers"]
    linear = layers * sum(rows * columns for rows, columns in shapes.values())
    tables = 1 if config.get("tie_word_embeddings") else 2
    embeddings = tables * config["vocab_size"] * config["hidden_size"]
    adapter = layers * sum(
        settings.rank * (rows + columns)
        for name, (rows, columns) in shapes.items()
        if settings.target_modules == "all-linear" or name in settings.target_modules
    )
    linear_bytes = NF4_BYTES if settings.method == "qlora" else BYTES[settings.dtype]
    row_tokens = counts["prompt_tokens"] + counts["supervised_tokens"]
    mean_tokens = row_tokens / max(1, counts["rows"])
    steps = settings.steps or math.ceil(
        (settings.epochs or 1) * counts["rows"] / settings.batch_rows
    )
    hidden = config["hidden_size"]
    # Per token and layer without recompute: inputs of norms, projections, attention, SwiGLU.
    kept = 1 if settings.checkpointing == "full" else 8 + 3 * config["intermediate_size"] / hidden
    micro_tokens = settings.micro_rows * counts.get("longest_row", int(mean_tokens))
    activations = int(micro_tokens * layers * hidden * kept * BYTES[settings.dtype])
    memory = {
        "weights": int(linear * linear_bytes + embeddings * BYTES[settings.dtype]),
        "adapter_and_optimizer": adapter * ADAM_BYTES,
        "activations": activations,
        "logits": int(micro_tokens * config["vocab_size"] * 4 * 2),
    }
    passes = 6 if settings.checkpointing == "full" else 4
    return {
        "memory_bytes": memory | {"peak": sum(memory.values())},
        "parameters": {"base": linear + embeddings, "trained": adapter},
        "tokens_per_epoch": row_tokens,
        "supervised_tokens_per_epoch": counts["supervised_tokens"],
        "steps": steps,
        "operations": passes * linear * steps * settings.batch_rows * mean_tokens,
    }


def _linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The (in, out) shapes of one layer's linear weights."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
