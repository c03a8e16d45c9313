"""Steps of preference pairs: both replies of a pair share its prompt, in one micro-batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from pipeline.errors import RunError
from pipeline.recipe import Train
from pipeline.train.steps import Steps, plan_steps, to_tensors
from pipeline.tree import IGNORED, Pack, count_tree_tokens, lay_out

Pair = tuple[list[int], list[int], list[int]]
"""A prompt's ids, those of the chosen reply and those of the rejected one."""


@dataclass
class PairPack(Pack):
    """Some pairs in one sequence: pair i is the rows 2i, chosen, and 2i + 1, rejected."""

    owners: list[int] = field(default_factory=list)
    """Which row a labelled token is of; 0 for any other."""
    num_pairs: int = 0


@dataclass(frozen=True)
class PairSteps(Steps):
    """Steps whose `rows` are pairs: prompt_ids, chosen_ids, rejected_ids and source."""

    with_mismatched: bool = False
    """Whether a step also has its prompts with the replies to others, as KTO asks for."""

    def __call__(self, items: list[dict[str, int]]) -> dict[str, Any]:
        """As of `Steps`, and `mismatched` like `packs`, `num_pairs` of the step, all processes."""
        (item,) = items
        step, rank = divmod(item["share"], self.num_processes)
        pairs = self.read_pairs(self.plan[step])
        packs = self.pack_pairs(pairs)
        mismatched = self.pack_pairs(mismatch(pairs)) if self.with_mismatched else []
        return {
            "packs": self._own_tensors(packs, rank),
            "mismatched": self._own_tensors(mismatched, rank),
            "num_pairs": len(pairs),
            "num_supervised": sum(pack.num_supervised for pack in packs),
            "num_row_tokens": sum(map(_count_alone, pairs)),
            "num_tokens": sum(len(pack.ids) for pack in packs),
        }

    def read_pairs(self, places: Sequence[int]) -> list[Pair]:
        """Some pairs' ids."""
        found = self.rows[list(places)]
        columns = (found[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
        return list(zip(*columns, strict=True))

    def pack_pairs(self, pairs: Sequence[Pair]) -> list[PairPack]:
        """Micro-batches that hold each pair once; one that is too long is by itself."""
        shared = self.packing == "tree"
        # Neighbours in this order have the longest beginnings in common.
        ordered = sorted(pairs) if shared else pairs
        return [lay_out_pairs(some, shared) for some in _fill(ordered, self.micro_tokens, shared)]

    def _own_tensors(self, packs: Sequence[PairPack], rank: int) -> list[dict[str, Any]]:
        return [_to_tensors(pack) for pack in (self.take_share(packs, rank) if packs else ())]


def read_pair_steps(path: Path, settings: Train, num_processes: int) -> PairSteps:
    """All steps of a training on a file of pairs; raises RunError if it holds none."""
    pairs = Dataset.from_file(str(path))
    if not len(pairs):
        raise RunError(
            f"{path} holds no preference pairs, which {settings.objective} learns from: give a "
            "source of format preference, or set train.objective=sft"
        )
    return PairSteps(
        pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids", "source"]),
        plan_steps([[place] for place in range(len(pairs))], settings),
        settings.packing,
        settings.tokens_at_once,
        num_processes,
        with_mismatched=settings.objective == "kto",
    )


def mismatch(pairs: Sequence[Pair]) -> list[Pair]:
    """Each prompt with the replies to the one before it; none of a pair alone."""
    if len(pairs) < 2:
        return []
    before = [pairs[-1], *pairs[:-1]]
    return [(pair[0], *other[1:]) for pair, other in zip(pairs, before, strict=True)]


def lay_out_pairs(pairs: Sequence[Pair], shared: bool) -> PairPack:
    """One pack of some pairs; with `shared` false each reply has a prompt to itself."""
    rows = [(prompt, reply) for prompt, *replies in pairs for reply in replies]
    pack = lay_out(rows, shared)
    order = sorted(range(len(rows)), key=rows.__getitem__)  # as they lie in the pack
    owners = iter([row for row in order for _ in rows[row][1]])
    return PairPack(
        **vars(pack),
        owners=[0 if label == IGNORED else next(owners) for label in pack.labels],
        num_pairs=len(pairs),
    )


def _fill(pairs: Sequence[Pair], max_tokens: int, shared: bool) -> Iterator[list[Pair]]:
    """Pairs in their order, as many at a time as fit."""
    some: list[Pair] = []
    for pair in pairs:
        if some and _count([*some, pair], shared) > max_tokens:
            yield some
            some = []
        some.append(pair)
    if some:
        yield some


def _count(pairs: Sequence[Pair], shared: bool) -> int:
    if not shared:
        return sum(map(_count_alone, pairs))
    return count_tree_tokens((prompt, reply) for prompt, *replies in pairs for reply in replies)


def _count_alone(pair: Pair) -> int:
    """Tokens of a pair's two rows."""
    prompt, chosen, rejected = map(len, pair)
    return 2 * prompt + chosen + rejected


def _to_tensors(pack: PairPack) -> dict[str, Any]:
    """As of a pack of rows, with `owners`, (1, tokens), and how many pairs they are of."""
    owners = torch.tensor([pack.owners], dtype=torch.int64)
    return to_tensors(pack) | {"owners": owners, "num_pairs": pack.num_pairs}
