"""Distances between two models' next-token distributions at given positions."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from pipeline.chat import Mode

Position = tuple[int, ...]
"""The ids a model has seen when it is asked for the next token."""
HeldOut = tuple[list[int], list[int], Mode | Literal["text"]]
"""Prompt ids, completion ids and mode of a held-out row."""


def choose_positions(rows: Sequence[HeldOut], most: int) -> list[Position]:
    """Positions of completion tokens, at most `most`: whole rows, one of each mode in turn.

    Taking turns keeps both modes in, however few positions are wanted; whole rows let an engine
    keep the prompt in its cache. The first token of a plain text follows nothing and is left out.
    """
    modes = sorted({mode for _, _, mode in rows})
    turns = zip_longest(*([row for row in rows if row[2] == mode] for mode in modes))
    positions = [
        tuple(row[0] + row[1][:size])
        for turn in turns
        for row in turn
        if row is not None
        for size in range(len(row[1]))
        if row[0] or size
    ]
    return positions[:most]


@torch.no_grad()
def logits_at(model: PreTrainedModel, positions: Sequence[Position]) -> torch.Tensor:
    """Next-token logits, (positions, vocabulary) in float32 on the CPU.

    Positions of one row are prefixes of each other, so one forward pass of the longest serves all.
    """
    result: torch.Tensor | None = None
    for ids, indices in _by_row(positions).items():
        places = torch.tensor([len(positions[index]) - 1 for index in indices])
        prompt = torch.tensor([ids], device=model.device)
        logits = model(prompt, logits_to_keep=places.to(model.device)).logits[0]
        if result is None:
            result = torch.empty(len(positions), logits.shape[-1])
        result[indices] = logits.float().cpu()
    assert result is not None
    return result


def _by_row(positions: Sequence[Position]) -> dict[Position, list[int]]:
    """Indices of positions under the longest position each is a prefix of."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    rows: dict[Position, list[int]] = {}
    waiting: list[int] = []
    for index, following in zip_longest(order, order[1:]):
        waiting.append(index)
        ids = positions[index]
        if following is None or positions[following][: len(ids)] != ids:
            rows[ids] = waiting
            waiting = []
    return rows


def compare(reference: torch.Tensor, candidate: torch.Tensor) -> dict[str, Any]:
    """KL(reference ‖ candidate) per position in nats, top-1 agreement, largest logit difference."""
    kl = torch.empty(len(reference), dtype=torch.float64)
    for index in range(len(reference)):  # row by row: float64 copies of all would be too large
        p = torch.log_softmax(reference[index].double(), dim=-1)
        q = torch.log_softmax(candidate[index].double(), dim=-1)
        kl[index] = (p.exp() * (p - q)).sum().clamp(min=0)
    same = reference.argmax(dim=-1) == candidate.argmax(dim=-1)
    return {
        "positions": len(reference),
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "top1_agreement": float(same.double().mean()),
        "max_logit_difference": float((reference - candidate).abs().max()),
    }


def compare_likeliest(
    reference: torch.Tensor, likeliest: Sequence[Mapping[int, float]]
) -> dict[str, Any]:
    """The same against an engine that gives only its likeliest tokens' log-probabilities.

    All other tokens are taken together as one. That makes the divergence a lower bound of the
    full one (data processing inequality), close because the likeliest tokens hold nearly all mass.
    """
    kl, same = [], 0
    for logits, tokens in zip(reference, likeliest, strict=True):
        p = torch.log_softmax(logits.double(), dim=-1).exp()
        ids = torch.tensor(list(tokens))
        q = torch.tensor(list(tokens.values()), dtype=torch.float64).exp()
        p_all = torch.cat([p[ids], (1 - p[ids].sum()).clamp(min=1e-12)[None]])
        q_all = torch.cat([q, (1 - q.sum()).clamp(min=1e-12)[None]])
        kl.append(float((p_all * (p_all.log() - q_all.log())).sum().clamp(min=0)))
        same += int(max(tokens, key=tokens.__getitem__) == int(logits.argmax()))
    return {
        "positions": len(kl),
        "mean_kl": sum(kl) / len(kl),
        "max_kl": max(kl),
        "top1_agreement": same / len(kl),
    }
