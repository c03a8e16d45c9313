"""What an epoch holds, from the data stage's report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import RunError
from pipeline.recipe import Train

PROMPT_TOKENS = 256
"""A question's prompt, for grpo, where the report has no rows to take it from."""


@dataclass(frozen=True)
class Rows:
    """Rows (pairs, for dpo and kto; replies, for grpo), and the tokens they add up to."""

    count: int
    tokens: int
    """Each row by itself."""
    shared: int
    """Where rows of a step compute once what they share."""
    supervised: int
    longest: int
    mean_square: float
    """Of a row's tokens: attention is quadratic in them."""

    @property
    def mean(self) -> float:
        """Tokens of a row by itself."""
        return self.tokens / max(1, self.count)

    def with_longest(self, longest: int) -> "Rows":
        """The same without what is longer, as a smaller data.max_tokens would leave them."""
        return replace(self, longest=min(self.longest, longest))


def read_rows(settings: Train, report: Mapping[str, Any], questions: int = 0) -> Rows:
    """What the objective learns from; `questions` is how many grpo has.

    Raises RunError where there is nothing of that kind.
    """
    counts = report["train"]
    if settings.objective == "grpo":
        return _replies(settings, counts, questions)
    if settings.objective in ("dpo", "kto"):
        return _pairs(counts, settings)
    tokens = counts["prompt_tokens"] + counts["supervised_tokens"]
    if not counts["rows"]:
        raise RunError("there are no rows to plan for: set train.objective for preference pairs")
    epoch = report.get("epoch") or {}
    shared = epoch.get("shared_tokens") or tokens
    histogram = (report.get("histograms") or {}).get("train", {}).get("row_tokens") or {}
    mean = tokens / counts["rows"]
    return Rows(
        count=counts["rows"],
        tokens=tokens,
        shared=shared if settings.packing == "tree" else tokens,
        supervised=counts["supervised_tokens"],
        longest=counts["longest_row"],
        mean_square=max(mean**2, _mean_square(histogram, counts["longest_row"])),
    )


def _mean_square(histogram: Mapping[str, int], longest: int) -> float:
    """Of values of which only the power of two above each is known: each taken for the middle."""
    total = sum(histogram.values())
    squares = (min(0.75 * int(value), longest) ** 2 * n for value, n in histogram.items())
    return sum(squares) / total if total else 0.0


def _pairs(counts: Mapping[str, int], settings: Train) -> Rows:
    """A pair is two rows, whose prompt is computed once with trees."""
    pairs = counts.get("pairs", 0)
    if not pairs:
        raise RunError(f"there are no preference pairs, which {settings.objective} learns from")
    if "pair_tokens" not in counts:
        raise RunError("the data report is of an older version: run `pipeline data` again")
    tokens, is_tree = counts["pair_tokens"], settings.packing == "tree"
    return Rows(
        count=pairs,
        tokens=tokens,
        shared=counts["shared_pair_tokens"] if is_tree else tokens,
        supervised=counts["supervised_pair_tokens"],
        # Without trees at most twice as long, for then the prompt stands there twice.
        longest=counts["longest_pair"] * (1 if is_tree else 2),
        mean_square=(tokens / pairs) ** 2,
    )


def _replies(settings: Train, counts: Mapping[str, int], questions: int) -> Rows:
    """Every reply taken to be as long as it may: how long they are is known when they are there."""
    rows = counts.get("rows", 0)
    prompt = math.ceil(counts["prompt_tokens"] / rows) if rows else PROMPT_TOKENS
    longest = prompt + settings.grpo.max_tokens
    replies = max(1, questions) * settings.grpo.replies
    tokens = replies * longest
    return Rows(replies, tokens, tokens, replies * settings.grpo.max_tokens, longest, longest**2)
