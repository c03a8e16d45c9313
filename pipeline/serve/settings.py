"""What a command line says of a server: all of it, or where the serve file is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.engine.choose import choose_engine
from pipeline.errors import PipelineError
from pipeline.serve.offer.choice import Choice
from pipeline.serve.offer.engines import Room
from pipeline.serve.offer.menu import Menu, Model, is_menu, read_menu

_OURS = ("auto", "llamacpp", "vllm")


@dataclass(frozen=True)
class Settings:
    """Where to listen, and what to run; what is left as it is here is for a serve file to say."""

    host: str = "127.0.0.1"
    is_open: bool = False
    """Whether everybody is answered, without a key."""
    port: int | None = None
    """0 is any free one; None is the serve file's, or 8000."""
    engine: str = "auto"
    """auto, llamacpp, vllm, or URLs, with commas between, of servers with the same model loaded."""
    artefact: Choice = "auto"
    """Which of a run's artefacts is served."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Put on what is served, by the slugs of the models they make."""
    model: str = ""
    """What clients call what is served, AUTHOR/SLUG; by default local/ and the folder's name."""
    room: Room = field(default_factory=Room)
    """Of an engine of ours."""
    books: str | None = None
    """Of keys and generations, as `open_books` has it; None is the serve file's, or the user's."""
    queue: int | None = None
    """Requests that may wait for an engine of ours; None is 8 for each of its slots."""
    workers: int = 1
    """Processes that answer."""
    is_provider: bool = False
    """Whether a router asks: it wants reasoning under the name that engines have for it, too."""
    grace_s: int = 10
    """How long running replies may take after the signal to stop."""


def read_target(path: Path, settings: Settings) -> Menu:
    """What a serve file says, or of anything else the one model that it is."""
    options = {
        "engine": settings.engine != "auto",
        "artefact": settings.artefact != "auto",
        "adapter": settings.adapters,
        "model": settings.model,
        "slots": settings.room.slots,
        "queue": settings.queue is not None,
        "context-tokens": settings.room.context_tokens,
    }
    if not is_menu(path):
        return Menu(models=(_model(path, settings),))
    for option, value in options.items():
        if value:
            raise PipelineError(f"--{option} is not for {path}, which says so of each model")
    return read_menu(path)


def _model(path: Path, settings: Settings) -> Model:
    urls = () if settings.engine in _OURS else choose_engine(settings.engine).urls
    options = {"artefact": settings.artefact != "auto", "adapter": settings.adapters}
    for option, value in options.items():
        if value and urls:
            raise PipelineError(f"--{option} is not for {settings.engine}, which has its model")
    if settings.model and not re.fullmatch(r"[\w.-]+/[\w.-]+", settings.model):
        raise PipelineError(f"--model {settings.model}: give AUTHOR/SLUG")
    adapters = {slug: {"adapter": str(folder)} for slug, folder in settings.adapters.items()}
    where = {"urls": urls, "tokenizer": str(path)}
    ours = {"run": str(path), "engine": settings.engine, "artefact": settings.artefact}
    said = {"slug": settings.model or None, "adapters": adapters, "slots": settings.room.slots}
    said |= {"context": settings.room.context_tokens, "queue": settings.queue}
    return Model.model_validate(said | (where if urls else ours))
