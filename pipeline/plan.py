"""Memory, tokens and operations before a GPU is rented: from a config and counts, no weights."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BaseError
from pipeline.recipe import Train

BYTES = {"bfloat16": 2.0, "float32": 4.0}
# NF4 with double quantisation: 4 bit a value, 8 bit a block of 64 for its absmax, and float32
# scales for blocks of 256 of these (Dettmers et al. 2023, QLoRA, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAM_BYTES = 4 + 4 + 4 + 4
"""A trained float32 value: itself, its gradient and Adam's two moments."""


@dataclass(frozen=True)
class Shape:
    """What a model's config.json says of its sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int
    tied: bool

    def linear(self) -> dict[str, tuple[int, int]]:
        """The (in, out) shapes of one layer's linear weights."""
        queries, keys = self.heads * self.head, self.key_heads * self.head
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    def num_linear(self) -> int:
        """Values of all layers' linear weights."""
        return self.layers * sum(rows * columns for rows, columns in self.linear().values())

    def num_embeddings(self) -> int:
        """Values of the embeddings, and of the output head where it is a table of its own."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden


def predict(settings: Train, base: Path, counts: dict[str, int]) -> dict[str, Any]:
    """What a run will hold, in bytes, and compute, predicted from shapes and the rows' counts.

    Operations are LoRA's own count: a forward pass and the gradient of activations, none of the
    frozen weights, so 4 per weight and token, and 6 with checkpointing's second forward pass.
    """
    shape = read_shape(base)
    row_tokens = counts["prompt_tokens"] + counts["supervised_tokens"]
    mean_tokens = row_tokens / max(1, counts["rows"])
    num_rows = max(1, round((settings.epochs or 1) * counts["rows"]))
    steps = settings.steps or math.ceil(num_rows / settings.batch_rows)
    step_tokens = int(settings.batch_rows * mean_tokens)
    micro_tokens = max(counts["longest_row"], min(settings.micro_tokens, step_tokens))
    memory = _memory(settings, shape, micro_tokens)
    passes = 6 if settings.checkpointing == "full" else 4
    return {
        "memory_bytes": memory | {"peak": sum(memory.values())},
        "parameters": {
            "base": shape.num_linear() + shape.num_embeddings(),
            "trained": _num_trained(settings, shape),
        },
        "tokens_per_epoch": row_tokens,
        "supervised_tokens_per_epoch": counts["supervised_tokens"],
        "steps": steps,
        "operations": passes * shape.num_linear() * steps * settings.batch_rows * mean_tokens,
    }


def read_shape(base: Path) -> Shape:
    """The sizes in a base's config.json; raises BaseError where they are missing or no sizes."""
    path = base / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise BaseError(f"{path} cannot be read as a model's config; fetch it again") from error

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key) or default
        if type(value) is not int or value < 1:
            raise BaseError(f"{path} gives no {key}, so nothing can be predicted from it")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    return Shape(
        hidden=hidden,
        inner=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        key_heads=size("num_key_value_heads", heads),
        head=size("head_dim", hidden // heads),
        vocabulary=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings")),
    )


def _memory(settings: Train, shape: Shape, micro_tokens: int) -> dict[str, int]:
    """Bytes by what they hold; `micro_tokens` are in memory at once.

    The embeddings and the output head keep the recipe's dtype in qlora, too; norms are too small
    to count.
    """
    value_bytes = BYTES[settings.dtype]
    linear_bytes = NF4_BYTES if settings.method == "qlora" else value_bytes
    # Per token and layer without recompute: inputs of norms, projections, attention, SwiGLU.
    kept = 1 if settings.checkpointing == "full" else 8 + 3 * shape.inner / shape.hidden
    return {
        "weights": int(shape.num_linear() * linear_bytes + shape.num_embeddings() * value_bytes),
        "adapter_and_optimizer": _num_trained(settings, shape) * ADAM_BYTES,
        "activations": int(micro_tokens * shape.layers * shape.hidden * kept * value_bytes),
        "logits": int(micro_tokens * shape.vocabulary * 4 * 2),
    }


def _num_trained(settings: Train, shape: Shape) -> int:
    return shape.layers * sum(
        settings.rank * (rows + columns)
        for name, (rows, columns) in shape.linear().items()
        if settings.target_modules == "all-linear" or name in settings.target_modules
    )
