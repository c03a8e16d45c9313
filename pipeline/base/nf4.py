"""A base as QLoRA trains on it: linear weights quantised to NF4, and back."""

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def as_trained(weight: torch.Tensor) -> torch.Tensor:
    """A weight through bf16 and NF4 with double quantisation, as `method: qlora` holds it.

    The arguments are those of transformers' BitsAndBytesConfig in `train`: blocks of 64 values,
    absmax values quantised again.
    """
    packed, state = quantize_4bit(weight.bfloat16(), quant_type="nf4", compress_statistics=True)
    return torch.as_tensor(dequantize_4bit(packed, state))


def quantised_weights(base: Path) -> frozenset[str]:
    """Names of the weights transformers quantises: every linear layer but the output head."""
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )


def load_as_trained(base: Path, method: str) -> PreTrainedModel:
    """The base an adapter was trained on, in float32 so that comparisons are not of noise.

    For qlora the linear weights are NF4's values, as the 4-bit layers compute with them.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if method == "qlora":
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name in quantised_weights(base):
                weights[name].copy_(as_trained(weights[name]))
    return model.eval()
