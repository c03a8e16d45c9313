"""Measure each artefact against the model as trained, and write the certificate."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.certify.gguf import ask_gguf
from pipeline.certify.greedy import answer, choose_prompts, count_agreed, summarise_greedy
from pipeline.certify.measure import (
    Distances,
    HeldOut,
    choose_rows,
    compare,
    compare_likeliest,
    count_modes,
    join,
    logits_of,
    places_by_mode,
    share_positions,
    summarise,
)
from pipeline.certify.model import Trained, load_adapted, load_checkpoint, rounded_to_bf16
from pipeline.certify.verdict import judge
from pipeline.certify.weights import check_weights, put_exact_weights
from pipeline.errors import RunError
from pipeline.recipe import Certify, Merge
from pipeline.run import BASE_GGUF

log = logging.getLogger(__name__)


_FEW_ROWS = 8


@dataclass(frozen=True)
class _Heard:
    """What is asked of the model as trained."""

    rows: list[HeldOut]
    prompts: list[HeldOut]
    num_tokens: int

    def listen(self, model: PreTrainedModel) -> tuple[list[torch.Tensor], list[HeldOut]]:
        """Its logits on the rows, and its greedy answers to the prompts."""
        logits = [logits_of(model, row) for row in self.rows]
        return logits, answer(model, self.prompts, self.num_tokens)


@dataclass(frozen=True)
class _Reference:
    """What the model as trained says of held-out rows."""

    rows: list[HeldOut]
    logits: list[torch.Tensor]
    """Of each row, (completion, vocabulary)."""
    base_kl: list[torch.Tensor]
    """Of each row, KL(trained ‖ base), (completion)."""
    answers: list[HeldOut]
    """Prompts with its greedy answers."""

    def at_most(self, positions: int) -> "_Reference":
        """The same of fewer positions."""
        sizes = share_positions(self.rows, positions)
        kept = [place for place, size in enumerate(sizes) if size]
        rows = [(p, c[:size], m) for (p, c, m), size in zip(self.rows, sizes, strict=True) if size]
        logits, base_kl = (
            [values[place][: sizes[place]] for place in kept]
            for values in (self.logits, self.base_kl)
        )
        return _Reference(rows, logits, base_kl, self.answers)


def certify(
    trained: Trained,
    artefacts: Mapping[str, Path],
    rows: Sequence[HeldOut],
    settings: Certify,
    engine_log: Path,
    merge: Merge | None = None,
) -> dict[str, Any]:
    """Compare artefacts with the model as trained on held-out rows; a certificate.

    `artefacts` are checkpoint folders and GGUF files by the recipe's names for them; of
    `adapter_gguf` the adapter's file, beside its base's. `merge` says how the checkpoint `merged`
    was made, whose every value is checked then, and of an adapter by itself there is an entry, too;
    None is for what somebody else made. Everything is computed in float32, so that what is measured
    is the artefact's loss and not arithmetic noise. One model is in memory at a time.

    The base of *effect* is what training began with: for lora and full the base as it is on disk,
    for qlora the base in 4 bit, which the adapter leaves when it is zero.
    """
    chosen = choose_rows(rows, max(settings.merged_positions, settings.gguf_positions))
    if not chosen:
        raise RunError("there is no held-out token to compare on: the rows are empty")
    _tell_shortage(chosen, settings.merged_positions)
    prompts = choose_prompts(rows, settings.greedy_prompts)
    heard = _Heard(chosen, prompts, settings.greedy_tokens)
    run = _run_checkpoint if trained.method == "full" else _run_adapter
    reference, measured = run(trained, heard, artefacts.get("merged"), merge)
    few = reference.at_most(settings.gguf_positions)
    for name, path in artefacts.items():
        log.info("comparing %s", path)
        if path.is_dir():
            found = _measure(load_checkpoint(path), reference)
        else:
            found = _measure_gguf(name, path, few, engine_log)
        measured[name] = measured.get(name, {}) | found
    return judge(measured, settings)


def _run_adapter(
    trained: Trained, heard: _Heard, merged: Path | None, merge: Merge | None
) -> tuple[_Reference, dict[str, Any]]:
    """One model for all that is beside its base: as trained, without adapter, in bf16, added up."""
    model = load_adapted(trained)
    logits, answers = heard.listen(model)
    with model.disable_adapter():
        base = [_compare(model, *pair) for pair in zip(heard.rows, logits, strict=True)]
    reference = _Reference(heard.rows, logits, [found.kl for found in base], answers)
    if merge is None:
        return reference, {}
    measured: dict[str, Any] = {"merged": {}} if merged else {}
    log.info("comparing the adapter beside its base in bfloat16")
    with rounded_to_bf16(model):
        measured["adapter"] = _measure(model, reference)
    if merged is not None:
        is_elsewhere = trained.method == "qlora" and merge.onto == "original"
        if is_elsewhere:
            del model
            model = load_adapted(trained, "original")
        exact, changed = put_exact_weights(model)
        checked = check_weights(exact.state_dict(), changed, trained.base, merged, merge.rounding)
        noise = {} if is_elsewhere else _measure_noise(exact, reference)
        measured["merged"] = checked | noise
    return reference, measured


def _measure_noise(exact: PreTrainedModel, reference: _Reference) -> dict[str, float]:
    """What adding the adapter to the weights costs by itself: float32's reassociation."""
    few = list(zip(reference.rows, reference.logits, strict=True))[:_FEW_ROWS]
    differences = [float((logits_of(exact, row) - usual).abs().max()) for row, usual in few]
    return {
        "float32_max_logit_error": max(differences),
        "max_logit": max(float(usual.abs().max()) for _, usual in few),
    }


def _run_checkpoint(
    trained: Trained, heard: _Heard, merged: Path | None, merge: Merge | None
) -> tuple[_Reference, dict[str, Any]]:
    """The same where all weights were trained."""
    model = load_checkpoint(trained.learnt)
    logits, answers = heard.listen(model)
    measured = {}
    if merged is not None and merge is not None:
        weights = model.state_dict()
        changed = frozenset(weights) if merge.rounding == "stochastic" else frozenset()
        measured["merged"] = check_weights(
            weights, changed, trained.base, merged, merge.rounding
        ) | {"adapted": 0}
        del weights
    del model
    base = load_checkpoint(trained.base)
    parts = [_compare(base, *pair) for pair in zip(heard.rows, logits, strict=True)]
    return _Reference(heard.rows, logits, [found.kl for found in parts], answers), measured


def _compare(model: PreTrainedModel, row: HeldOut, usual: torch.Tensor) -> Distances:
    return compare(usual, logits_of(model, row), row[1])


def _measure(model: PreTrainedModel, reference: _Reference) -> dict[str, Any]:
    pairs = zip(reference.rows, reference.logits, strict=True)
    found = join([_compare(model, row, usual) for row, usual in pairs])
    agreed = [count_agreed(model, each) for each in reference.answers]
    return _tell(found, agreed, reference)


def _measure_gguf(name: str, file: Path, reference: _Reference, log: Path) -> dict[str, Any]:
    model, adapter = file, None
    if name == "adapter_gguf":
        model, adapter = file.with_name(BASE_GGUF), file
    said = ask_gguf(model, reference.rows, reference.answers, log, adapter)
    rows = zip(reference.rows, reference.logits, said.likeliest, strict=True)
    found = join([compare_likeliest(usual, tokens, row[1]) for row, usual, tokens in rows])
    return _tell(found, said.agreed, reference)


def _tell(found: Distances, agreed: Sequence[int], reference: _Reference) -> dict[str, Any]:
    base_kl = torch.cat(reference.base_kl)
    by_mode = {
        mode: summarise(found.at(places), base_kl[places])
        for mode, places in places_by_mode(reference.rows).items()
    }
    greedy = summarise_greedy(agreed, reference.answers)
    return summarise(found, base_kl) | greedy | {"by_mode": by_mode}


def _tell_shortage(rows: Sequence[HeldOut], wanted: int) -> None:
    counts = count_modes(rows)
    if sum(counts.values()) < wanted:
        each = ", ".join(f"{count} {mode}" for mode, count in counts.items())
        log.warning("only %s held-out tokens to compare on, %d are wanted", each, wanted)
    if len(missing := {"direct", "thinking"} - counts.keys()) == 1:
        log.warning("no held-out token is of mode %s, of which nothing is proved", *missing)
