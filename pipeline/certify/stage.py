"""Measure each artefact against the model as trained, and write the certificate."""

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.base.nf4 import load_as_trained
from pipeline.certify.gguf import ask_gguf
from pipeline.certify.measure import (
    HeldOut,
    Position,
    choose_positions,
    compare,
    compare_likeliest,
    logits_at,
)
from pipeline.certify.verdict import judge
from pipeline.certify.weights import check_all_weights, check_weights, put_exact_weights
from pipeline.recipe import Certify

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The model as trained: an adapter on the base it was trained on, or a whole checkpoint."""

    base: Path
    learnt: Path
    """The adapter; of method full the checkpoint."""
    method: str


def certify(
    trained: Trained,
    merged: Path,
    ggufs: Mapping[str, Path],
    rows: Sequence[HeldOut],
    settings: Certify,
    engine_log: Path,
) -> dict[str, Any]:
    """Compare the merged checkpoint and each GGUF file with the model as trained.

    `ggufs` is format to file, `rows` are held-out rows. Everything is computed
    in float32, so that what is measured is the artefact's loss and not arithmetic noise. One model
    is in memory at a time.
    """
    most = max(settings.merged_positions, settings.gguf_positions)
    positions = choose_positions(rows, most)
    few = positions[: settings.gguf_positions]
    log.info("comparing the merged checkpoint on %d held-out tokens", len(positions))
    reference = _run(_load_trained(trained), positions)
    artefacts = {
        "merged": _check(trained, merged, reference[: len(few)], few)
        | compare(reference, _run(_load(merged), positions))
    }
    for gguf_format, file in ggufs.items():
        log.info("asking %s for %d tokens", file.name, len(few))
        likeliest = ask_gguf(file, few, engine_log)
        artefacts[gguf_format] = compare_likeliest(reference[: len(few)], likeliest)
    return judge(artefacts, settings.max_mean_kl.model_dump())


def _load_trained(trained: Trained) -> PreTrainedModel:
    if trained.method == "full":
        return _load(trained.learnt)
    base = load_as_trained(trained.base, trained.method)
    return PeftModel.from_pretrained(base, str(trained.learnt), autocast_adapter_dtype=True)


def _load(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def _check(
    trained: Trained, merged: Path, reference: torch.Tensor, positions: Sequence[Position]
) -> dict[str, Any]:
    """The stored values; and of an adapter what adding it to the weights costs by itself.

    That is float32's reassociation.
    """
    if trained.method == "full":
        return check_all_weights(trained.learnt, merged)
    base = load_as_trained(trained.base, trained.method)
    exact = _run(put_exact_weights(base, trained.learnt), positions)
    return check_weights(trained.base, trained.learnt, trained.method, merged) | {
        "float32_max_logit_error": float((exact - reference).abs().max()),
        "max_logit": float(reference.abs().max()),
    }


def _run(model: PreTrainedModel, positions: Sequence[Position]) -> torch.Tensor:
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    device = _choose_device(num_bytes, _free_accelerator_bytes())
    return logits_at(model.eval().to(device), positions)


def _choose_device(num_bytes: int, free: int | None) -> str:
    """Where a model of a size is run: on the CPU unless `free` holds it and its activations."""
    if free is None:
        return "cpu"
    needed = num_bytes * 1.25
    if free > needed:
        return "cuda"
    log.info(
        "comparing on the CPU: it takes %.1f GB in float32 and the GPU has %.1f GB free",
        needed / 1e9,
        free / 1e9,
    )
    return "cpu"


def _free_accelerator_bytes() -> int | None:
    """Free memory of the GPU, that of the model before given back; None without a GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])
    return None
