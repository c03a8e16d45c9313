"""Qwen3's dialogue for a base that has none: its control tokens and its chat template."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Special tokens: hidden in decoded text."""
BLOCK_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
"""Single tokens that are not special: they stay visible, as in Qwen3's own tokenizer."""

# Qwen2's and Qwen3's own split, so that llama.cpp's `qwen2` pre-tokenizer is the right one.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_byte_tokenizer(out: Path) -> None:
    """Write tokenizer files in which every byte is a token and Qwen3's control tokens are single.

    Ids: 0-255 bytes, then <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258, and the blocks.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # llama.cpp refuses a vocabulary without merges; two zero bytes do not meet in any text.
    pair = ("Ā", "Ā")
    names = [*letters, *CONTROL_TOKENS, *BLOCK_TOKENS, "".join(pair)]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[pair]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in BLOCK_TOKENS])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    write_dialogue_files(out)


def write_dialogue_files(out: Path) -> None:
    """Write Qwen3's chat template and a tokenizer config that ends turns at <|im_end|>."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    # A copy of the official template (Qwen/Qwen3-8B, Apache-2.0); a test compares it with trl's.
    template = Path(__file__).with_name("qwen3.jinja").read_text(encoding="utf-8")
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
