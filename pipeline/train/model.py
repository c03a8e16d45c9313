"""The base as it is trained on, and the adapter on it: our words to PEFT's and bitsandbytes'."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from pipeline.errors import BaseError, RecipeError
from pipeline.recipe import Train


def load_base(base: Path, settings: Train) -> PreTrainedModel:
    """The frozen base in the recipe's dtype (TRL would load float32), or in 4 bit for qlora."""
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
            dtype=getattr(torch, settings.dtype),
            quantization_config=quantization,
            # Both take a pack's mask; neither needs flash attention, and flex has no CPU backward.
            attn_implementation="flex_attention" if torch.cuda.is_available() else "sdpa",
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BaseError(f"{base} cannot be loaded: {error}") from error
    model.config.use_cache = False
    return model


def with_adapter(model: PreTrainedModel, settings: Train) -> PeftModel:
    """The base with a fresh adapter, its weights in float32."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules
        if isinstance(settings.target_modules, str)
        else list(settings.target_modules),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # PEFT names the modules it did not find
        raise RecipeError(f"train.target_modules: {error}") from error


def keep_adapter_in_float32(model: PeftModel) -> None:
    """Undo TRL's cast of adapters on a quantised base to bf16, which loses small updates."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
