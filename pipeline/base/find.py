"""What a recipe's `base:` means: a folder, made, local or fetched from the hub. Torch-free."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipeline.errors import BaseError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "LICENSE*"]


@dataclass(frozen=True)
class Base:
    """A base checkpoint on disk."""

    folder: Path
    commit: str | None = None
    """The hub commit it was fetched at; None for a local folder."""


def find_base(base: str, revision: str | None) -> Base:
    """The folder a recipe's base lies in, fetched from the hub if need be.

    A folder wins over a hub id of the same spelling. A cut connection goes on where it stopped;
    after a stopped run the files that had arrived whole are kept. What is in the cache already is
    found without the hub, too.
    Raises BaseError in one sentence for what is not there, not allowed or not reachable.
    """
    if is_folder(base):
        return Base(_checked(Path(base)))
    if base.startswith("random:"):
        folder = Path("bases") / base.replace(":", "-")
        made = f"`pipeline base random --like {base.partition(':')[2]} --out {folder}`"
        if not folder.is_dir():
            raise BaseError(f"base {base} is not made yet: run {made} first")
        return Base(_checked(folder))
    if not _HUB_ID.fullmatch(base) or base.startswith("bases/"):
        raise BaseError(
            f"there is no base {base}: no such folder; make one with `pipeline base demo` or "
            "`pipeline base tiny`, or name a hub id such as Qwen/Qwen3-8B"
        )
    return _fetch(base, revision)


def is_folder(base: str) -> bool:
    """Whether a recipe's base is a folder that is there."""
    return Path(base).is_dir()


def _checked(folder: Path) -> Path:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise BaseError(f"{folder} is not a checkpoint: {name} is missing")
    return folder


def _fetch(base: str, revision: str | None) -> Base:
    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=_WANTED))
    except (HTTPError, HFValidationError, UnicodeError, OSError) as error:
        raise BaseError(_explain(error, base, revision)) from error
    return Base(_checked(folder), commit=folder.name)  # snapshots/COMMIT


def _explain(error: Exception, base: str, revision: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return f"{base} is gated: accept its terms and set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{base} has no revision {revision}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no model {base}, or it is private: check the spelling, set HF_TOKEN"
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return f"the hub refuses access to {base}: set a valid HF_TOKEN"
    if isinstance(error, UnicodeError):
        return f"{base} cannot be asked for: HF_TOKEN holds letters that no token has"
    wanted = f"{base} at {revision}" if revision else base
    host = os.environ.get("HF_ENDPOINT", "the hub")
    return f"{wanted} could not be fetched from {host}: {_first(error.__cause__ or error)}"


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
