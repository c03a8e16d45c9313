"""The base as it is trained on, and the adapter on it: our words to PEFT's and bitsandbytes'."""

from collections.abc import Sequence
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from pipeline.errors import BaseError, RecipeError
from pipeline.recipe import Train
from pipeline.train.variants import PackTensors, begin


def load_base(base: Path, settings: Train) -> PreTrainedModel:
    """The base: in float32 where all of it is trained, for bfloat16 would lose small updates.

    Else frozen, in the recipe's dtype (TRL would load float32), or in 4 bit for qlora.
    """
    quantization = None
    if settings.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.float32 if settings.method == "full" else getattr(torch, settings.dtype),
            quantization_config=quantization,
            # Both take a pack's mask; neither needs flash attention, and flex has no CPU backward.
            attn_implementation="flex_attention" if torch.cuda.is_available() else "sdpa",
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BaseError(f"{base} cannot be loaded: {error}") from error
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 one forward pass in eval mode would repack the weights for
            # good: its kernel rounds more coarsely, and gradients do not flow through it.
            module.support_avx512bf16_for_cpu = False
    return model


def make_model(
    settings: Train, base: Path, packs: Sequence[PackTensors] = ()
) -> PreTrainedModel | PeftModel:
    """What is trained: the base with a fresh adapter, or for `full` the base itself."""
    model = load_base(base, settings)
    return model if settings.method == "full" else with_adapter(model, settings, packs)


def with_adapter(
    model: PreTrainedModel, settings: Train, packs: Sequence[PackTensors] = ()
) -> PeftModel:
    """The base with a fresh adapter, its weights in float32; `packs` of rows are for eva."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules
        if isinstance(settings.target_modules, str)
        else list(settings.target_modules),
        use_rslora=settings.variant == "rslora",
        use_dora=settings.variant == "dora",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:  # PEFT names the modules it did not find
        raise RecipeError(f"train.target_modules: {error}") from error
    begin(adapted, settings, packs)
    return adapted


def keep_adapter_in_float32(model: PeftModel) -> None:
    """Undo TRL's cast of adapters on a quantised base to bf16, which loses small updates."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
