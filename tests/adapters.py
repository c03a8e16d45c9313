"""Adapters made by PEFT itself, with random factors, for tests."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def make_adapter(base: Path, out: Path, seed: int = 0, b_scale: float = 0.002, **lora: Any) -> Path:
    """An adapter on every linear layer of a base; with `b_scale` 0 it changes nothing."""
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | lora
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            parameter.data.normal_(0, 1, generator=generator)
        elif ".lora_B." in name:
            parameter.data.normal_(0, 1, generator=generator).mul_(b_scale)
    adapted.save_pretrained(out, save_embedding_layers=False)
    return out
