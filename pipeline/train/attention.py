"""Who sees whom in a pack: one rule (design law 2), as a mask for each kind of attention."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from pipeline.tree import IGNORED

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


def fill_block(pack: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A pack with at least one block of tokens: those added are documents of their own, unlabelled.

    For fewer queries than a block flex attention takes another kernel, made for decoding.
    """
    size = pack["ends"].shape[1]
    missing = max(0, BLOCK - size)
    filled = {
        "input_ids": functional.pad(pack["input_ids"], (0, missing)),
        "labels": functional.pad(pack["labels"], (0, missing), value=IGNORED),
        "position_ids": functional.pad(pack["position_ids"], (0, missing)),
    }
    own = torch.arange(size + 1, size + missing + 1, device=pack["ends"].device)
    return filled | {"ends": torch.cat((pack["ends"], own[None]), 1)}


def _list_blocks(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of blocks how many are wanted, and which, these first."""
    order = torch.argsort(wanted.int(), dim=-1, descending=True, stable=True)
    return wanted.sum(-1).int()[None, None], order.int()[None, None]
