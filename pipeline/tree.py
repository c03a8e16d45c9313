"""Rows as prefix trees: a beginning that rows share is computed once (design law 2).

A pack is a forest of such trees in one sequence, depth first. A token's position id is its depth,
and one integer a token is enough for attention: `end[k]` is where k's subtree ends, and the token
at q sees the one at k iff `k <= q < end[k]`. Only prompt tokens are shared, and never a row's last
one: each row has its own copy of that, followed by its completion, so the usual loss on the next
token of the sequence is exact.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

IGNORED = -100
"""The label of a token that is not trained."""
MIN_SHARED = 16
"""Rows that share fewer tokens are in trees of their own: a template's first words, say."""

TreeRow = tuple[list[int], list[int]]
"""A row's prompt ids and completion ids; the prompt of a plain text is empty."""


@dataclass
class Pack:
    """Some rows in one sequence. All lists have one number a token."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    """The token itself where it is trained, else IGNORED."""
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @property
    def num_supervised(self) -> int:
        """How many tokens are trained."""
        return sum(label != IGNORED for label in self.labels)


def lay_out(rows: Iterable[TreeRow], shared: bool = True) -> Pack:
    """One pack of some rows; with `shared` false each row has all of its prompt to itself."""
    pack = Pack()
    path: list[int] = []  # where the tokens of the current row's shareable prompt stand
    before: list[int] = []
    for prompt, completion in sorted(rows):
        shareable = prompt[:-1]
        num_shared = count_shared(before, shareable) if shared else 0
        _close(pack, path, num_shared)
        for depth in range(num_shared, len(shareable)):
            path.append(len(pack.ids))
            _append(pack, shareable[depth], IGNORED, depth)
        _append_own(pack, prompt[-1:], completion, len(shareable))
        before = shareable
    _close(pack, path, 0)
    return pack


def _close(pack: Pack, path: list[int], size: int) -> None:
    """The subtrees of all tokens on a path but its first `size` end here."""
    for place in path[size:]:
        pack.ends[place] = len(pack.ids)
    del path[size:]


def _append(pack: Pack, token: int, label: int, depth: int) -> None:
    pack.ids.append(token)
    pack.labels.append(label)
    pack.positions.append(depth)
    pack.ends.append(0)


def _append_own(pack: Pack, last: list[int], completion: list[int], depth: int) -> None:
    """What no other row has: its copy of the last prompt token, and its completion."""
    start = len(pack.ids)
    labels = [IGNORED] * len(last) + completion
    if not last:
        labels[:1] = [IGNORED]  # nothing stands before a plain text's first token
    for offset, (token, label) in enumerate(zip(last + completion, labels, strict=True)):
        _append(pack, token, label, depth + offset)
    pack.ends[start:] = [len(pack.ids)] * (len(pack.ids) - start)


def pack_rows(rows: Iterable[TreeRow], max_tokens: int) -> list[Pack]:
    """Packs of at most `max_tokens` tokens that hold every row once.

    Rows with a common beginning stay together as a tree; a tree that is too big is cut into several
    that repeat what they share. Trees then go where they leave the least room (best fit,
    decreasing). A row that is longer by itself gets a pack of its own.
    """
    trees = sorted(_cut_into_trees(sorted(rows), max_tokens), key=count_tree_tokens, reverse=True)
    packs: list[list[TreeRow]] = []
    sizes: list[int] = []
    for tree in trees:
        size = count_tree_tokens(tree)
        room = [(max_tokens - used - size, index) for index, used in enumerate(sizes)]
        fitting = [(left, index) for left, index in room if left >= 0]
        if fitting:
            _, index = min(fitting)
            packs[index] += tree
            sizes[index] += size
        else:
            packs.append(list(tree))
            sizes.append(size)
    return [lay_out(pack) for pack in packs]


def _cut_into_trees(rows: Sequence[TreeRow], max_tokens: int) -> Iterable[list[TreeRow]]:
    """Sorted rows in runs that share their beginning with their neighbours and fit."""
    tree: list[TreeRow] = []
    size = 0
    for row in rows:
        num_tokens = len(row[0]) + len(row[1])
        num_shared = count_shared(tree[-1][0][:-1], row[0][:-1]) if tree else 0
        if tree and num_shared >= MIN_SHARED and size + num_tokens - num_shared <= max_tokens:
            size += num_tokens - num_shared
        else:
            if tree:
                yield tree
            tree, size = [], num_tokens
        tree.append(row)
    if tree:
        yield tree


def count_tree_tokens(rows: Iterable[TreeRow]) -> int:
    """Tokens of the forest of some rows."""
    shareable: list[list[int]] = []
    num_tokens = 0
    for prompt, completion in rows:
        num_tokens += len(prompt) + len(completion)
        shareable.append(prompt[:-1])
    shareable.sort()  # neighbours in this order have the longest beginnings in common
    return num_tokens - sum(count_shared(one, other) for one, other in pairwise(shareable))


def count_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two sequences have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
