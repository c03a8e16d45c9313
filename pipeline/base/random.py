"""The base `random`: true shape, random weights, for benchmarks at full size."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline.base.checkpoint import Shape, tensor_bytes, write_index, write_shard
from pipeline.base.dialogue import write_byte_tokenizer
from pipeline.base.names import SHAPES, check_shape

_SHARD_BYTES = 2 << 30
_BLOCK_VALUES = 16 << 20


def make_random(out: Path, shape: str) -> None:
    """Write a checkpoint of a shape, shard by shard; its tokenizer is the byte tokenizer of `tiny`.

    Norm weights are one, all others normal with a deviation of 0.02, so that activations keep the
    size they have in a real model.
    """
    config = shape_config(shape)
    write_byte_tokenizer(out)
    with torch.device("meta"):
        tensors = {
            name: ("BF16", tuple(values.shape))
            for name, values in Qwen3ForCausalLM(config).state_dict().items()
            if not (config.tie_word_embeddings and name == "lm_head.weight")
        }
    shards = _split(tensors)
    names = {
        f"model-{number:05}-of-{len(shards):05}.safetensors": list(shard)
        for number, shard in enumerate(shards, start=1)
    }
    generator = torch.Generator().manual_seed(0)
    for (name, _), shard in zip(names.items(), shards, strict=True):
        write_shard(out / name, shard, _random_blocks(shard, generator))
    write_index(out, names, sum(2 * _count(shape) for _, shape in tensors.values()))
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(out)
    generation = {"eos_token_id": [258, 256], "pad_token_id": 256}
    (out / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")


def shape_config(shape: str) -> Qwen3Config:
    """The config of a Qwen3 size, by a name such as qwen3-8b; raises BaseError for another."""
    check_shape(shape)
    hidden, intermediate, layers, heads, tied = SHAPES[shape]
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=258,
        pad_token_id=256,
        dtype="bfloat16",
    )


def _split(tensors: dict[str, Shape]) -> list[dict[str, Shape]]:
    shards: list[dict[str, Shape]] = [{}]
    size = 0
    for name, (dtype, shape) in tensors.items():
        num_bytes = 2 * _count(shape)
        if shards[-1] and size + num_bytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += num_bytes
    return shards


def _random_blocks(shard: dict[str, Shape], generator: torch.Generator) -> Iterator[memoryview]:
    for name, (_, shape) in shard.items():
        left = _count(shape)
        while left:
            size = min(left, _BLOCK_VALUES)
            block = torch.ones(size, dtype=torch.bfloat16)
            if not name.endswith("norm.weight"):
                block.normal_(0, 0.02, generator=generator)
            yield tensor_bytes(block)
            left -= size


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
