"""The base `tiny`: Qwen3's architecture and template over a byte vocabulary, for tests."""

from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from pipeline.base.dialogue import write_byte_tokenizer


def make_tiny(out: Path) -> None:
    """Write a random Qwen3 of some 200,000 parameters with a tokenizer into a folder."""
    write_byte_tokenizer(out)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=258,
        pad_token_id=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=[258, 256], pad_token_id=256)
    model.save_pretrained(out)
