"""What a recipe's `base:` may say, from its spelling and the disk: no network, no GPU stack."""

import re
from pathlib import Path

from pipeline.errors import BaseError

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, tie_word_embeddings
# as in the config.json of Qwen/Qwen3-0.6B and its larger siblings.
SHAPES = {
    "qwen3-0.6b": (1024, 3072, 28, 16, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, True),
    "qwen3-4b": (2560, 9728, 36, 32, True),
    "qwen3-8b": (4096, 12288, 36, 32, False),
}
_RANDOM = "random:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_base(base: str) -> None:
    """Raise BaseError in one sentence for a base that can be neither here, made nor fetched.

    random:SHAPE may still have to be made, and only the hub knows what it has.
    """
    folder = local_folder(base)
    if folder is not None and folder.is_dir():
        check_checkpoint(folder)
    elif base.startswith(_RANDOM):
        check_shape(base.removeprefix(_RANDOM))
    elif not _HUB_ID.fullmatch(base) or base.startswith("bases/"):
        raise BaseError(
            f"there is no base {base}: no such folder; make one with `pipeline base demo` or "
            "`pipeline base tiny`, or name a hub id such as Qwen/Qwen3-8B"
        )


def local_folder(base: str) -> Path | None:
    """The folder a base lies in, or will when it is made; None for a hub id."""
    if Path(base).is_dir():
        return Path(base)
    return random_folder(base) if base.startswith(_RANDOM) else None


def random_folder(base: str) -> Path:
    """Where random:SHAPE is made."""
    return Path("bases") / base.replace(":", "-")


def check_shape(shape: str) -> None:
    """Raise BaseError for a shape nobody knows."""
    if shape not in SHAPES:
        raise BaseError(f"there is no shape {shape!r}; known: {', '.join(SHAPES)}")


def check_checkpoint(folder: Path) -> None:
    """Raise BaseError for a folder without the files every checkpoint has."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise BaseError(f"{folder} is not a checkpoint: {name} is missing")
    refuse_pickles(folder)


def refuse_pickles(folder: Path) -> None:
    """Raise BaseError for a folder whose only weights would have to be unpickled."""
    is_safe = any(folder.glob("*.safetensors"))
    if not is_safe and (any(folder.glob("*.bin")) or any(folder.glob("*.pt"))):
        raise BaseError(f"{folder} holds pickled weights, which can run code; use safetensors")
