"""How an adapter begins, by variant: PEFT's own arithmetic, on factors that are float32.

PiSSA and OLoRA take the directions they begin with out of the base: W is held as W - s·B₀A₀. What
they learn is told against W itself at the end (`save`), so B₀A₀ is kept, also in checkpoints: the
directions found on another machine would be others. In bfloat16 the rest of W is rounded once more.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, PeftModel, get_peft_model_state_dict, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from pipeline.base.checkpoint import read_layout, read_tensor
from pipeline.errors import RecipeError
from pipeline.recipe import Train
from pipeline.train.attention import block_mask, dense_mask
from pipeline.train.steps import Steps, to_tensors
from pipeline.tree import pack_rows

Weights = dict[str, torch.Tensor]
PackTensors = dict[str, torch.Tensor]
NAME = "default"
"""PEFT's name of a model's only adapter."""
EVA_ROWS = 64
EVA_TOKENS = 1024
"""Tokens in a pass: PEFT hashes every activation of the first one, number by number."""
_MOST_PASSES = 500
_FILE = "beginning.safetensors"


def choose_packs(steps: Steps, settings: Train) -> list[PackTensors]:
    """Packs of some rows, chosen by the seed, for a variant that begins with rows; else none."""
    if settings.variant != "eva" or settings.objective != "sft":
        return []
    num_rows = min(EVA_ROWS, len(steps.rows))
    places = random.Random(settings.seed).sample(range(len(steps.rows)), num_rows)
    return [to_tensors(pack) for pack in pack_rows(steps.read(places), EVA_TOKENS)]


def begin(model: PeftModel, settings: Train, packs: Sequence[PackTensors] = ()) -> None:
    """Set a fresh adapter's weights as the recipe's variant says; `packs` of rows are for eva.

    Raises RecipeError if eva is given none, or too few to find as many directions as the rank.
    """
    if settings.variant in ("none", "rslora"):
        return  # PEFT's own beginning
    if torch.cuda.is_available() and settings.method == "lora":
        model.to("cuda")  # all others look at every weight of the base
    if settings.variant == "dora":
        _measure_lengths(model)
    elif settings.variant == "eva":
        _begin_with_activations(model, settings, packs)
    else:
        _take_out_of_the_base(model, settings.variant)


def read_factors(model: PeftModel, weights: Weights | None = None) -> Weights:
    """The adapter's weights as PEFT names them in a file; out of `weights` if these are given."""
    found = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    return {name: factor.detach() for name, factor in found.items()}


def read_beginning(model: Any) -> Weights:
    """The factors whose product was taken out of the base; none for most models."""
    beginning: Weights = getattr(model, "beginning", {})
    return beginning


def keep_beginning(model: Any, checkpoint: Path) -> None:
    """Write them into a checkpoint, if there are any."""
    if beginning := read_beginning(model):
        save_file(beginning, checkpoint / _FILE)


def begin_again(model: Any, checkpoint: Path) -> None:
    """Take the factors a checkpoint began with out of the base, instead of those found just now."""
    now = read_beginning(model)
    if not now:
        return
    then = load_file(checkpoint / _FILE)
    if all(torch.equal(now[name], factor) for name, factor in then.items()):
        return
    base = Path(model.peft_config[NAME].base_model_name_or_path)
    tensors = {tensor.name: tensor for shard in read_layout(base).values() for tensor in shard}
    for name, layer in _layers(model).items():
        weight = layer.get_base_layer().weight
        whole = read_tensor(tensors[f"{name.removeprefix('base_model.model.')}.weight"])
        taken = then[f"{name}.lora_B.weight"] @ then[f"{name}.lora_A.weight"]
        rest = whole.to(weight.dtype).float() - layer.scaling[NAME] * taken
        weight.data.copy_(rest)
    model.beginning = then


def _layers(model: PeftModel) -> dict[str, Any]:
    return {n: module for n, module in model.named_modules() if isinstance(module, LoraLayer)}


def _measure_lengths(model: PeftModel) -> None:
    """The length of each row of W, of which PEFT has taken those in the base's dtype."""
    for layer in _layers(model).values():
        layer.lora_magnitude_vector[NAME].update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[NAME].weight,
            lora_B=layer.lora_B[NAME].weight,
            scaling=layer.scaling[NAME],
        )


def _take_out_of_the_base(model: PeftModel, variant: str) -> None:
    for layer in _layers(model).values():
        if variant == "pissa":  # by the paper's fast decomposition, its section 3.3
            layer.pissa_init(NAME, "pissa_niter_16")
        else:
            layer.olora_init(NAME)
    model.beginning = {name: w.cpu().clone() for name, w in read_factors(model).items()}


def _begin_with_activations(
    model: PeftModel, settings: Train, packs: Sequence[PackTensors]
) -> None:
    """A's rows are the principal components of each layer's inputs (Paischer et al. 2024)."""
    if not packs:
        raise RecipeError(f"variant eva begins with rows, which {settings.objective} has none of")
    if max(pack["input_ids"].shape[1] for pack in packs) < settings.rank:
        raise RecipeError("train.variant: eva needs longer rows than train.rank has directions")
    passes = iter(range(_MOST_PASSES))

    def forward(model: Any, pack: PackTensors) -> None:
        if next(passes, None) is None:
            raise RecipeError(
                f"train.variant: eva found no {settings.rank} steady directions in "
                f"{_MOST_PASSES} passes over {len(packs)} packs of rows; use more rows or a lower "
                "train.rank"
            )
        ends = pack["ends"]
        mask = block_mask(ends) if ends.is_cuda else dense_mask(ends)
        inputs = {key: pack[key] for key in ("input_ids", "position_ids")}
        model(**inputs, attention_mask=mask, logits_to_keep=1, use_cache=False)

    config = model.peft_config[NAME]
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)  # all ranks equal
    initialize_lora_eva_weights(
        model,
        [{key: pack[key] for key in ("input_ids", "position_ids", "ends")} for pack in packs],
        forward_fn=forward,
        gather_distributed_inputs=False,  # every process has the same rows
        show_progress_bar=False,
    )
    config.init_lora_weights, config.eva_config = True, None  # from here on it is a plain LoRA
