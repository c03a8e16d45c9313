"""Who sees whom in a pack: one rule (design law 2), as a mask for each kind of attention."""

from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Flex attention skips, masks or takes whole so many queries and as many keys at a time."""


def sees(query: Any, key: Any, end: Any) -> Any:
    """Whether a token sees one that stands at `key` and whose subtree ends at `end`."""
    return (key <= query) & (query < end)


def dense_mask(ends: torch.Tensor) -> torch.Tensor:
    """The rule for a pack's ends, (1, tokens), as booleans, (1, 1, tokens, tokens): for sdpa."""
    places = torch.arange(ends.shape[1], device=ends.device)
    mask: torch.Tensor = sees(places[:, None], places[None, :], ends[0][None, :])
    return mask[None, None]


def block_mask(ends: torch.Tensor) -> BlockMask:
    """The same for flex attention, which skips blocks where nobody sees anybody.

    It is what `create_block_mask` finds by evaluating the rule for every pair of tokens, found
    from each block's least and greatest end: a pack may be as long as a context.
    """
    size = ends.shape[1]
    padded = functional.pad(ends[0], (0, -size % BLOCK)).view(-1, BLOCK)
    keys = torch.arange(len(padded), device=ends.device)[None, :]
    queries = keys.T
    is_seen = (keys < queries) & (padded.amax(1) > queries * BLOCK) | (keys == queries)
    is_full = (keys < queries) & (padded.amin(1) >= (queries + 1) * BLOCK)

    def rule(batch: Any, head: Any, query: Any, key: Any) -> Any:  # noqa: ARG001
        return sees(query, key, ends[0][key])

    return BlockMask.from_kv_blocks(
        *_list_blocks(is_seen & ~is_full),
        *_list_blocks(is_full),
        BLOCK_SIZE=BLOCK,
        mask_mod=rule,
        seq_lengths=(size, size),
    )


def _list_blocks(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of blocks how many are wanted, and which, these first."""
    order = torch.argsort(wanted.int(), dim=-1, descending=True, stable=True)
    return wanted.sum(-1).int()[None, None], order.int()[None, None]
