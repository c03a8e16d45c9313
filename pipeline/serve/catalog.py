"""The models a server offers, and where a path's GGUF file, dialogue and certificate lie."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.certify.verdict import refuse_if_missed
from pipeline.chat import Chat
from pipeline.engine.protocol import Engine
from pipeline.errors import PipelineError, RequestError
from pipeline.recipe import load_recipe
from pipeline.run import Run, read_json

AUTHOR = "local"
# A q8_0 file answers like the bf16 one and is half as large; which is certified, not believed.
_PREFERRED = ("q8_0", "bf16", "")


@dataclass(frozen=True)
class Artefact:
    """What lies at a path: the folder of its tokenizer and chat template, and its GGUF file."""

    name: str
    folder: Path
    gguf: Path | None
    """None where there is no such file: an engine elsewhere may have the model loaded."""

    @property
    def slug(self) -> str:
        """What clients call it."""
        return f"{AUTHOR}/{self.name}"

    @property
    def tokenizer(self) -> Path:
        """What every engine needs here, as the prompt is made by us."""
        return self.folder / "tokenizer.json"


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
    """What lies at a path: a run folder or its recipe, a folder with a .gguf file, such a file.

    The tokenizer and the template must lie beside the file, as `pipeline export` leaves them.
    """
    if path.suffix in (".yaml", ".yml") and not path.is_dir():
        path = _run_folder(path)
    if not path.exists():
        raise PipelineError(f"{path} does not exist: give a run folder or a .gguf file")
    if path.is_file() and path.suffix != ".gguf":
        raise PipelineError(f"{path} is not a .gguf file: give a run folder or a .gguf file")
    if path.is_file():
        artefact = Artefact(_slugged(path.stem), path.parent, path)
    else:
        folder, whole = path / "exports" if (path / "exports").is_dir() else path, path.resolve()
        name = whole.parent.name if whole.name == "exports" else whole.name
        artefact = Artefact(_slugged(name), folder, _preferred(folder))
    for needed in ("tokenizer.json", "chat_template.jinja"):
        if not (artefact.folder / needed).is_file():
            raise PipelineError(
                f"{artefact.folder} has no {needed}: run `pipeline export`, "
                "or copy the checkpoint's own there"
            )
    return artefact


def refuse_uncertified(artefact: Artefact, gguf: Path | None) -> None:
    """Raise GateMissed if the run's certificate says that this file missed its limit.

    None is a file we do not know, made from the run's merged checkpoint. What has no certificate,
    such as a file from elsewhere, is not held to one.
    """
    folder = artefact.folder.resolve()
    run = Run(folder.parent)
    if folder.name != run.exports.name or not run.certificate.is_file():
        return
    certificate = read_json(run.certificate)
    measured = certificate["artefacts"]
    stem = gguf.stem.lower() if gguf else ""
    kind = next((kind for kind in measured if stem.endswith(f"-{kind}")), "merged")
    if kind in measured:
        refuse_if_missed({**certificate, "artefacts": {kind: measured[kind]}})


def _slugged(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _run_folder(recipe: Path) -> Path:
    folder = Run.named(load_recipe(recipe).name).folder
    if not folder.is_dir():
        raise PipelineError(f"{folder} does not exist: run the stages of {recipe} first")
    return folder


def _preferred(folder: Path) -> Path | None:
    files = sorted(folder.glob("*.gguf"))
    choices = (file for word in _PREFERRED for file in files if word in file.name.lower())
    return next(choices, None)
