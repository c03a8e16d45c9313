"""A model's sizes, from its config.json: no weights are read."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import BaseError
from pipeline.recipe import Train


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
    has_head_norms: bool = False
    """Whether queries and keys are normalised, as Qwen3's are."""

    @property
    def queries(self) -> int:
        """Values a token's queries have in one layer, all heads together."""
        return self.heads * self.head

    @property
    def keys(self) -> int:
        """The same of its keys, and of its values."""
        return self.key_heads * self.head

    def linear(self) -> dict[str, tuple[int, int]]:
        """The (in, out) shapes of one layer's linear weights."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    def adapted(self, settings: Train) -> dict[str, tuple[int, int]]:
        """The (in, out) shapes of those of one layer that get an adapter."""
        if settings.method == "full":
            return {}
        wanted = settings.target_modules
        linear = self.linear()
        return {n: linear[n] for n in linear if wanted == "all-linear" or n in wanted}

    def num_linear(self) -> int:
        """Values of all layers' linear weights."""
        return self.layers * sum(rows * columns for rows, columns in self.linear().values())

    def num_head(self) -> int:
        """Values of the output head."""
        return self.vocabulary * self.hidden

    def num_embeddings(self) -> int:
        """Values of the embeddings, and of the output head where it is a table of its own."""
        return (1 if self.tied else 2) * self.num_head()

    def num_weights(self) -> int:
        """Values of the whole base but its norms, which are too few to count."""
        return self.num_linear() + self.num_embeddings()

    def num_trained(self, settings: Train) -> int:
        """Values that are trained: of the adapter, DoRA's lengths included, or all weights."""
        if settings.method == "full":
            return self.num_weights()
        lengths = settings.variant == "dora"
        return self.layers * sum(
            settings.rank * (rows + columns) + columns * lengths
            for rows, columns in self.adapted(settings).values()
        )


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
        has_head_norms=str(config.get("model_type")).startswith("qwen3"),
    )
