"""Which rows an optimizer step learns from, and how they are laid out in its micro-batches."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any, TypeVar

import torch
from datasets import Dataset

from pipeline.recipe import Train
from pipeline.tree import IGNORED, Pack, TreeRow, lay_out, pack_rows

SomePack = TypeVar("SomePack", bound=Pack)


def plan_steps(conversations: Sequence[Sequence[int]], settings: Train) -> list[list[int]]:
    """The rows of each step, given the rows of each conversation.

    In every epoch the seed shuffles the conversations; their rows, one after the other, fill steps
    of `batch_rows`. A conversation may spill over into the next step, an epoch too. The packing
    has no say in it.
    """
    num_rows = sum(map(len, conversations))
    wanted = max(1, round((settings.epochs or 1) * num_rows))
    if settings.steps is not None:
        wanted = settings.steps * settings.batch_rows
    order: list[int] = []
    epoch = 0
    while len(order) < wanted:
        shuffled = list(conversations)
        random.Random(f"{settings.seed} {epoch}").shuffle(shuffled)
        order += [row for rows in shuffled for row in rows]
        epoch += 1
    starts = range(0, wanted, settings.batch_rows)
    return [order[start : min(start + settings.batch_rows, wanted)] for start in starts]


def group_conversations(places: Sequence[tuple[str, int]]) -> list[list[int]]:
    """Rows in runs of one conversation, by each row's source and turn.

    A conversation that stands there twice, for its weight, is two: its turns begin again.
    """
    groups: list[list[int]] = [[0]] if places else []
    for index, (before, after) in enumerate(pairwise(places), start=1):
        if after[0] == before[0] and after[1] > before[1]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@dataclass(frozen=True)
class Steps:
    """A data collator: the number of a step's share to its micro-batches.

    Item `step * num_processes + rank` is what one process does of a step.
    """

    rows: Dataset
    """prompt_ids, completion_ids and source."""
    plan: list[list[int]]
    packing: str
    micro_tokens: int
    num_processes: int = 1

    def __call__(self, items: list[dict[str, int]]) -> dict[str, Any]:
        """`packs`: tensors for each micro-batch; `num_supervised`: of the step, all processes."""
        (item,) = items
        step, rank = divmod(item["share"], self.num_processes)
        rows = self.read(self.plan[step])
        packs = self.pack(rows)
        return {
            "packs": [to_tensors(pack) for pack in self.take_share(packs, rank)],
            "num_supervised": sum(pack.num_supervised for pack in packs),
            "num_row_tokens": sum(len(prompt) + len(completion) for prompt, completion in rows),
            "num_tokens": sum(len(pack.ids) for pack in packs),
        }

    def take_share(self, packs: Sequence[SomePack], rank: int) -> list[SomePack]:
        """What one process does of a step's packs.

        All processes go through the model equally often: a sharded one needs each of them.
        """
        own = list(packs[rank :: self.num_processes])
        return own + [_blank(packs[0])] * (ceil(len(packs) / self.num_processes) - len(own))

    def read(self, places: Sequence[int]) -> list[TreeRow]:
        """Some rows' prompt and completion ids."""
        found = self.rows[list(places)]
        return list(zip(found["prompt_ids"], found["completion_ids"], strict=True))

    def pack(self, rows: Sequence[TreeRow]) -> list[Pack]:
        """The micro-batches of some rows."""
        if self.packing == "tree":
            return pack_rows(rows, self.micro_tokens)
        return [lay_out(some, shared=False) for some in _fill(rows, self.micro_tokens)]


def _fill(rows: Sequence[TreeRow], max_tokens: int) -> Iterator[list[TreeRow]]:
    """Rows in their order, as many at a time as fit."""
    some: list[TreeRow] = []
    size = 0
    for row in rows:
        num_tokens = len(row[0]) + len(row[1])
        if some and size + num_tokens > max_tokens:
            yield some
            some, size = [], 0
        some.append(row)
        size += num_tokens
    if some:
        yield some


def _blank(pack: SomePack) -> SomePack:
    """A pack that teaches nothing: for a process that has one pack less than others."""
    return type(pack)(pack.ids[:1], [IGNORED], [0], [1])


def to_tensors(pack: Pack) -> dict[str, torch.Tensor]:
    """A pack as a batch of one: (1, tokens) each."""
    return {
        "input_ids": torch.tensor([pack.ids]),
        "labels": torch.tensor([pack.labels]),
        "position_ids": torch.tensor([pack.positions]),
        "ends": torch.tensor([pack.ends]),
    }
