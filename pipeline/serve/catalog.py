"""The models a server offers, and where a path's GGUF file and dialogue lie."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.chat import Chat
from pipeline.engine.protocol import Engine
from pipeline.errors import PipelineError, RequestError

AUTHOR = "local"
# A q8_0 file answers like the bf16 one and is half as large; which is certified, not believed.
_PREFERRED = ("q8_0", "bf16", "")


@dataclass(frozen=True)
class Artefact:
    """A GGUF file, and the folder its tokenizer and chat template lie in."""

    name: str
    gguf: Path
    folder: Path

    @property
    def slug(self) -> str:
        """What clients call it."""
        return f"{AUTHOR}/{self.name}"


@dataclass(frozen=True)
class Served:
    """One model on offer."""

    name: str
    chat: Chat
    engine: Engine
    created: int
    """Unix seconds."""

    @property
    def slug(self) -> str:
        """What clients call it."""
        return f"{AUTHOR}/{self.name}"

    @property
    def context_tokens(self) -> int:
        """Prompt and completion together may be this long."""
        return self.engine.context_tokens


@dataclass(frozen=True)
class Catalog:
    """Every model on offer; the first is the default."""

    models: Sequence[Served]

    def find(self, model: str | None) -> Served:
        """By slug or bare name; None is the default. RequestError for any other word."""
        if model is None:
            return self.models[0]
        for served in self.models:
            if model in (served.slug, served.name):
                return served
        raise RequestError(f"{model} is not a valid model ID")


def find_artefact(path: Path) -> Artefact:
    """What to serve at a path: a run folder, a folder with a .gguf file, or such a file.

    The tokenizer and the template must lie beside the file, as `pipeline export` leaves them.
    """
    if not path.exists():
        raise PipelineError(f"{path} does not exist: give a run folder or a .gguf file")
    if path.is_file():
        gguf, name = path, path.stem
    else:
        folder = path / "exports" if (path / "exports").is_dir() else path
        gguf = _preferred(folder)
        whole = path.resolve()
        name = whole.parent.name if whole.name == "exports" else whole.name
    if gguf.suffix != ".gguf":
        raise PipelineError(f"{path} is not a .gguf file: give a run folder or a .gguf file")
    for needed in ("tokenizer.json", "chat_template.jinja"):
        if not (gguf.parent / needed).is_file():
            raise PipelineError(
                f"{gguf.parent} has no {needed}: copy the checkpoint's own beside {gguf.name}"
            )
    return Artefact(re.sub(r"[^A-Za-z0-9._-]+", "-", name), gguf, gguf.parent)


def _preferred(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise PipelineError(f"{folder} has no .gguf file: run `pipeline export` first")
    return next(file for word in _PREFERRED for file in files if word in file.name.lower())
