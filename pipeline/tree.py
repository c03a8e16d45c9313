"""Rows as prefix trees: what they cost when a shared beginning is computed once."""

from collections.abc import Iterable
from itertools import pairwise


def count_tree_tokens(rows: Iterable[tuple[list[int], list[int]]]) -> int:
    """Tokens of the prefix tree of some rows, each a prompt and a completion (design law 2).

    Only prompts are shared, and never a row's last prompt token.
    """
    shareable: list[list[int]] = []
    num_tokens = 0
    for prompt, completion in rows:
        num_tokens += len(prompt) + len(completion)
        shareable.append(prompt[:-1])
    shareable.sort()  # neighbours in this order have the longest beginnings in common
    for one, other in pairwise(shareable):
        num_tokens -= _count_common(one, other)
    return num_tokens


def _count_common(one: list[int], other: list[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
