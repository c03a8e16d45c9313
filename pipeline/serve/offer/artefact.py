"""What lies at a path: the dialogue's files, what an engine loads, adapters to put on it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.chat import template_text
from pipeline.engine.choose import Kind
from pipeline.errors import PipelineError
from pipeline.recipe import load_recipe
from pipeline.run import LORA_ENDING, Run
from pipeline.serve.offer.catalog import AUTHOR
from pipeline.serve.offer.choice import (
    Choice,
    Chosen,
    choose,
    is_checkpoint,
    refuse_uncertified,
    refuse_uncertified_adapter,
    run_of,
)
from pipeline.serve.offer.gguf import gguf_adapter_of, gguf_of

_KNOWN = "give a run folder, a checkpoint's folder or a .gguf file"
_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


@dataclass(frozen=True)
class Artefact:
    """What is served, and the folder of its tokenizer and chat template."""

    name: str
    folder: Path
    chosen: Chosen

    @property
    def slug(self) -> str:
        """What clients call it, unless the server was told another name."""
        return f"{AUTHOR}/{self.name}"

    @property
    def tokenizer(self) -> Path:
        """What every engine needs here, as the prompt is made by us."""
        return self.folder / "tokenizer.json"

    @property
    def run(self) -> Run | None:
        """The run it belongs to, if stages of ours have made it."""
        run = run_of(self.folder)
        return run if run and (run.recipe.is_file() or run.manifest.is_file()) else None


@dataclass(frozen=True)
class Load:
    """Files for an engine."""

    weights: Path
    """A GGUF file for llama.cpp, a checkpoint's folder for vLLM."""
    adapters: Mapping[str, Path]
    """By the slug of the model each makes: GGUF files, or folders in PEFT's layout."""


def find_artefact(path: Path, choice: Choice = "auto", kind: Kind = "llamacpp") -> Artefact:
    """What lies at a path: a run folder or its recipe, a checkpoint, a .gguf file or its folder.

    `choice` is for a run's artefacts, `kind` the engine's. The tokenizer and the template must lie
    beside a .gguf file, as `pipeline export` leaves them.
    """
    if path.suffix in (".yaml", ".yml") and not path.is_dir():
        path = _run_folder(path)
    if not path.exists():
        raise PipelineError(f"{path} does not exist: {_KNOWN}")
    if path.is_file():
        _check_file(path, choice, kind)
        artefact = Artefact(_slugged(path.stem), path.parent, Chosen(path))
    elif is_checkpoint(path) and run_of(path) is None:
        if choice not in ("auto", "merged"):
            raise PipelineError(f"--artefact {choice} is a run's, and {path} is a checkpoint")
        chosen = Chosen(None, checkpoint=None if kind == "elsewhere" else path)
        artefact = Artefact(_slugged(path.resolve().name), path, chosen)
    else:
        artefact = _in_folder(path, choice, kind)
    if not artefact.tokenizer.is_file():
        raise PipelineError(
            f"{artefact.folder} has no tokenizer.json: run `pipeline export`, "
            "or copy the checkpoint's own there"
        )
    template_text(artefact.folder)  # raises if there is none
    return artefact


def load(artefact: Artefact, adapters: Mapping[str, Path], kind: Kind) -> Load:
    """What an engine is started with; GGUF files that llama.cpp lacks are made, which takes time.

    `adapters` by the slugs of the models they make. Raises GateMissed for what is not certified.
    """
    refuse_uncertified(artefact.folder, artefact.chosen)
    chosen = artefact.chosen
    found = {artefact.slug: chosen.adapter} if chosen.adapter else {}
    if kind == "vllm":
        assert chosen.checkpoint is not None
        return Load(chosen.checkpoint, found | {s: _peft(f, kind) for s, f in adapters.items()})
    if chosen.gguf is None and chosen.checkpoint is None:
        raise PipelineError(f"{artefact.folder} has no .gguf file: run `pipeline export` first")
    made = {slug: _gguf_adapter(artefact, folder) for slug, folder in adapters.items()}
    weights = chosen.gguf or gguf_of(chosen.checkpoint or artefact.folder)
    return Load(weights, found | made)


def name_adapters(words: list[str]) -> dict[str, Path]:
    """NAME=FOLDER of a command line by the slug of the model that is made."""
    found: dict[str, Path] = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not folder or not _NAME.fullmatch(name):
            raise PipelineError(f"--adapter {word}: give NAME=FOLDER or AUTHOR/NAME=FOLDER")
        slug = name if "/" in name else f"{AUTHOR}/{name}"
        if slug in found:
            raise PipelineError(f"--adapter: two adapters are called {slug}")
        found[slug] = Path(folder)
    return found


def _in_folder(path: Path, choice: Choice, kind: Kind) -> Artefact:
    """A run's folder, a folder in it, or any folder with GGUF files."""
    run = run_of(path) or Run(path)
    is_run = any(folder.is_dir() for folder in (run.exports, run.merged))
    folder = path
    if is_run and run.folder == path:
        folder = run.exports if (run.exports / "tokenizer.json").is_file() else run.merged
    whole = run.folder if is_run else path
    return Artefact(_slugged(whole.resolve().name), folder, choose(folder, choice, kind))


def _check_file(file: Path, choice: Choice, kind: Kind) -> None:
    if file.suffix != ".gguf":
        raise PipelineError(f"{file} is not a .gguf file: {_KNOWN}")
    if file.name.endswith(LORA_ENDING):
        raise PipelineError(f"{file} is an adapter: give its run folder, with --artefact adapter")
    if choice != "auto":
        raise PipelineError(f"--artefact {choice} chooses in a run folder, and {file} is a file")
    if kind == "vllm":
        raise PipelineError(f"vLLM does not load GGUF files such as {file}: give its checkpoint")


def _gguf_adapter(artefact: Artefact, adapter: Path) -> Path:
    if adapter.is_file() and adapter.suffix == ".gguf":
        return adapter
    folder, run = _peft(adapter, "llamacpp"), run_of(artefact.folder)
    bases = [artefact.chosen.checkpoint, run and run.merged, artefact.folder]
    base = next((base for base in bases if base and (base / "config.json").is_file()), None)
    if base is None:
        raise PipelineError(
            f"{adapter} cannot be put on {artefact.chosen.gguf} without its config.json: serve the "
            "checkpoint, or give the adapter as a .gguf file"
        )
    return gguf_adapter_of(folder, base)


def _peft(folder: Path, kind: Kind) -> Path:
    """An adapter's folder in PEFT's layout; a run's folder means the adapter it has trained."""
    if Run(folder).adapter.is_dir():
        folder = Run(folder).adapter
    for needed in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / needed).is_file():
            raise PipelineError(f"{folder} is not an adapter: {needed} is missing")
    refuse_uncertified_adapter(Run(folder.resolve().parent), kind)
    return folder


def _slugged(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _run_folder(recipe: Path) -> Path:
    folder = Run.named(load_recipe(recipe).name).folder
    if not folder.is_dir():
        raise PipelineError(f"{folder} does not exist: run the stages of {recipe} first")
    return folder
