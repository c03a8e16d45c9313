"""Distances between two models' next-token distributions along held-out rows."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from pipeline.chat import Mode

HeldOut = tuple[list[int], list[int], Mode | Literal["text"]]
"""Prompt ids, completion ids and mode of a held-out row. Each completion token is a position: what
a model says of it after all that stands before it."""
_AT_ONCE = 16  # positions in float64 beside each other: of all at once they would be too large


def choose_rows(rows: Sequence[HeldOut], most: int) -> list[HeldOut]:
    """Rows with `most` completion tokens together, as many in each mode, one of each in turn.

    Whole rows let an engine go on from what it has, so only the last of a mode is cut. The first
    token of a plain text follows nothing, so it is the prompt.
    """
    ordered = [(p, c, mode) if p else (c[:1], c[1:], mode) for p, c, mode in in_turns(rows)]
    cut = zip(ordered, share_positions(ordered, most), strict=True)
    return [(prompt, completion[:size], mode) for (prompt, completion, mode), size in cut if size]


def share_positions(rows: Sequence[HeldOut], most: int) -> list[int]:
    """How many of each row's positions are taken for `most` in all, the first rows' first.

    Each mode gets the same share, however long its rows are; what one lacks is the others'.
    """
    there = count_modes(rows)
    left = {}
    for number, mode in enumerate(sorted(there, key=there.__getitem__)):
        left[mode] = min(there[mode], most // (len(there) - number))
        most -= left[mode]
    taken = []
    for _, completion, mode in rows:
        taken.append(min(len(completion), left[mode]))
        left[mode] -= taken[-1]
    return taken


def in_turns(rows: Sequence[HeldOut]) -> Iterator[HeldOut]:
    """The rows, one of each mode in turn."""
    modes = sorted({mode for _, _, mode in rows})
    turns = zip_longest(*([row for row in rows if row[2] == mode] for mode in modes))
    return (row for turn in turns for row in turn if row is not None)


def count_modes(rows: Iterable[HeldOut]) -> dict[str, int]:
    """How many positions the rows have in each mode."""
    counts: Counter[str] = Counter()
    for _, completion, mode in rows:
        counts[mode] += len(completion)
    return dict(sorted(counts.items()))


def places_by_mode(rows: Sequence[HeldOut]) -> dict[str, torch.Tensor]:
    """Which of all rows' positions, one row after the other, are of each mode."""
    modes = [mode for _, completion, mode in rows for _ in completion]
    return {mode: torch.tensor([m == mode for m in modes]) for mode in sorted({*modes})}


@torch.no_grad()
def logits_of(model: PreTrainedModel, row: HeldOut) -> torch.Tensor:
    """Next-token logits of a row's positions, (completion, vocabulary), float32 on the CPU."""
    prompt, completion, _ = row
    ids = torch.tensor([[*prompt, *completion[:-1]]], device=model.device)
    return torch.as_tensor(model(ids, logits_to_keep=len(completion)).logits[0].float().cpu())


@dataclass(frozen=True)
class Distances:
    """How far an artefact is from the model as trained: each (positions), in nats, float64."""

    kl: torch.Tensor
    """KL(trained ‖ artefact)."""
    same: torch.Tensor
    """1 where both have the same likeliest token, else 0."""
    largest: torch.Tensor
    """The largest difference of a token's logits; from an engine of its log-probabilities."""
    surprise: torch.Tensor
    """-log p of the row's own token, by the artefact."""
    usual: torch.Tensor
    """The same by the model as trained."""

    def at(self, places: torch.Tensor) -> "Distances":
        """Those at some of the positions."""
        names = self.__dataclass_fields__
        return Distances(**{name: getattr(self, name)[places] for name in names})


def join(parts: Sequence[Distances]) -> Distances:
    """The positions of all parts, one after the other."""
    names = Distances.__dataclass_fields__
    return Distances(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})


def compare(trained: torch.Tensor, artefact: torch.Tensor, ids: Sequence[int]) -> Distances:
    """Distances between two models' logits, each (positions, vocabulary); `ids` are a row's own."""
    own = torch.tensor(ids)
    cuts = [slice(first, first + _AT_ONCE) for first in range(0, len(ids), _AT_ONCE)]
    return join([_compare(trained[cut], artefact[cut], own[cut]) for cut in cuts])


def _compare(trained: torch.Tensor, artefact: torch.Tensor, ids: torch.Tensor) -> Distances:
    p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (trained, artefact))
    return Distances(
        # Rounding may leave less than nothing; NaN stays, and never passes.
        kl=(p.exp() * (p - q)).sum(dim=-1).clamp(min=0),
        same=(trained.argmax(dim=-1) == artefact.argmax(dim=-1)).double(),
        largest=(trained.double() - artefact.double()).abs().amax(dim=-1),
        surprise=-q.gather(1, ids[:, None])[:, 0],
        usual=-p.gather(1, ids[:, None])[:, 0],
    )


def compare_likeliest(
    trained: torch.Tensor, likeliest: Sequence[Mapping[int, float]], ids: Sequence[int]
) -> Distances:
    """The same to an engine that gives only its likeliest tokens' log-probabilities.

    All other tokens are taken together as one. That makes the divergence a lower bound of the
    full one (data processing inequality), close because the likeliest tokens hold nearly all mass.
    A row's own token that is not among them is taken for the least of them.
    """
    rows = zip(trained, likeliest, ids, strict=True)
    return join([_compare_likeliest(logits, tokens, own) for logits, tokens, own in rows])


def _compare_likeliest(logits: torch.Tensor, tokens: Mapping[int, float], own: int) -> Distances:
    said = torch.log_softmax(logits.double(), dim=-1)
    ids = torch.tensor(list(tokens))
    q = torch.tensor(list(tokens.values()), dtype=torch.float64)
    p_all, q_all = (
        torch.cat([some, (1 - some.sum()).clamp(min=1e-12)[None]])
        for some in (said[ids].exp(), q.exp())
    )
    same = max(tokens, key=tokens.__getitem__) == int(logits.argmax())
    return Distances(
        kl=(p_all * (p_all.log() - q_all.log())).sum().clamp(min=0)[None],
        same=torch.tensor([same], dtype=torch.float64),
        largest=(said[ids] - q).abs().amax()[None],
        surprise=-torch.tensor([tokens.get(own, min(tokens.values()))], dtype=torch.float64),
        usual=-said[own][None],
    )


def summarise(found: Distances, base_kl: torch.Tensor) -> dict[str, Any]:
    """What a certificate says of some positions; `base_kl` is KL(trained ‖ base) at the same ones.

    *Effect* is the share of what was learnt that is still there, 1 - KL(trained ‖ artefact) /
    KL(trained ‖ base), each the mean over the positions; None where nothing was learnt.
    """
    assert len(base_kl) == len(found.kl)
    learnt = float(base_kl.mean())
    return {
        "positions": len(found.kl),
        "mean_kl": float(found.kl.mean()),
        "max_kl": float(found.kl.max()),
        "effect": 1 - float(found.kl.mean()) / learnt if learnt else None,
        "top1_agreement": float(found.same.mean()),
        "max_logit_difference": float(found.largest.max()),
        "perplexity": float(found.surprise.mean().exp()),
        "trained_perplexity": float(found.usual.mean().exp()),
    }
