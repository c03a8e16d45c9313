"""The models a server offers."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.chat import Chat
from pipeline.engine.protocol import Engine
from pipeline.errors import EngineDown, RequestError

AUTHOR = "local"


@dataclass(frozen=True)
class Served:
    """One model on offer."""

    name: str
    chat: Chat
    engine: Engine
    created: int
    """Unix seconds."""
    adapter: str | None = None
    """What a Lane calls the LoRA adapter that makes this model of the engine's base."""
    author: str = AUTHOR
    engine_name: str = ""
    """For the books: which kind of engine answers."""
    artefact_hash: str | None = None
    """For the books: sha256 of what answers, where it lies here."""

    @property
    def slug(self) -> str:
        """What clients call it."""
        return f"{self.author}/{self.name}"

    @property
    def context_tokens(self) -> int:
        """Prompt and completion together may be this long."""
        return self.engine.context_tokens


@dataclass
class Catalog:
    """Every model on offer; the first is the default."""

    models: Sequence[Served]
    is_draining: bool = False
    """Whether the server is about to stop: replies under way end, and no other begins."""

    def find(self, model: str | None) -> Served:
        """By slug or bare name; None is the default. RequestError for any other word.

        EngineDown while the server is about to stop.
        """
        if self.is_draining:
            raise EngineDown("the server is about to stop")
        if model is None:
            return self.models[0]
        for served in self.models:
            if model in (served.slug, served.name):
                return served
        raise RequestError(f"{model} is not a valid model ID")

    async def is_ready(self) -> bool:
        """Whether every model can be asked now."""
        return not self.is_draining and all(
            [await served.engine.is_healthy() for served in self.models]
        )
