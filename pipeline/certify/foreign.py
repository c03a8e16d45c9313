"""What somebody else made of an adapter and its base: which kind it is, and whether it can be."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFReader, LlamaFileType

from pipeline.base.checkpoint import shard_names
from pipeline.errors import RunError

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
# general.file_type of a GGUF file, and the bounds it is held to; others to those of the fewest bits
_FILE_TYPES = {
    LlamaFileType.ALL_F32: "f16",
    LlamaFileType.MOSTLY_F16: "f16",
    LlamaFileType.MOSTLY_BF16: "bf16",
    LlamaFileType.MOSTLY_Q8_0: "q8_0",
    LlamaFileType.MOSTLY_Q6_K: "q6_k",
    LlamaFileType.MOSTLY_Q5_K_M: "q5_k_m",
    LlamaFileType.MOSTLY_Q5_K_S: "q5_k_m",
}
_LEAST = "q4_k_m"


def kind_of(artefact: Path, base: Path) -> str:
    """The recipe's name for what a checkpoint folder or GGUF file is, by which it is judged.

    Raises RunError for a path that is neither, and for a model of other sizes than the base;
    BaseError for a checkpoint without weights in safetensors.
    """
    wanted = _sizes(_read_config(base))
    if artefact.is_dir():
        config = _read_config(artefact)
        shard_names(artefact)
        kind, found = _kind_of_checkpoint(artefact, config), _sizes(config)
    elif artefact.is_file() and artefact.suffix == ".gguf":
        kind, found = _read_gguf(artefact)
    else:
        raise RunError(f"{artefact} is neither a checkpoint's folder nor a .gguf file")
    for name, size in wanted.items():
        if found[name] != size:
            raise RunError(
                f"{artefact} was not made from {base}: its {name} is {found[name]}, not {size}"
            )
    return kind


def _read_config(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder: give one with a checkpoint")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise RunError(f"{folder} holds no checkpoint: {file.name} is missing") from error
    except (ValueError, TypeError) as error:
        raise RunError(f"{file} is not a model's configuration") from error


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config.get(name) for name in _SIZES}


def _kind_of_checkpoint(artefact: Path, config: Mapping[str, Any]) -> str:
    quantised = config.get("quantization_config")
    if quantised is None:
        return "merged"
    if quantised.get("quant_method") != "compressed-tensors":
        raise RunError(
            f"{artefact} is in {quantised.get('quant_method')}; of checkpoints in fewer bits only "
            "those in compressed-tensors can be certified"
        )
    return "fp8" if "float" in str(quantised.get("format")) else "int4"


def _read_gguf(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        fields = GGUFReader(file).fields
        architecture = fields["general.architecture"].contents()
        found = (
            len(fields["tokenizer.ggml.tokens"].data),
            fields[f"{architecture}.embedding_length"].contents(),
            fields[f"{architecture}.block_count"].contents(),
        )
        file_type = fields["general.file_type"].contents()
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise RunError(f"{file} is not a model's GGUF file") from error
    return _FILE_TYPES.get(file_type, _LEAST), dict(zip(_SIZES, found, strict=True))
