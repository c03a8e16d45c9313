"""The models a server offers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.chat import Chat
from pipeline.engine.protocol import Engine
from pipeline.errors import Availability, EngineDown, RequestError

AUTHOR = "local"
# What OpenRouter lets follow a model's id. The first few choose among providers, or say what this
# server does anyway: a model thinks unless the request says otherwise.
_SAME = frozenset(["exacto", "floor", "nitro", "thinking"])
_ABSENT = {"extended": "no_endpoints", "free": "free_variant_ended"}
_LATEST = "-latest"


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
        """What `resolve` finds, for a request to be answered; None is the default.

        EngineDown while the server is about to stop.
        """
        if self.is_draining:
            raise EngineDown("the server is about to stop")
        return self.models[0] if model is None else self.resolve(model)

    def resolve(self, model: str) -> Served:
        """What AUTHOR/SLUG, SLUG or ~AUTHOR/FAMILY-latest means, also if a :VARIANT follows.

        RequestError, with its availability, for any other word.
        """
        if served := self._named(model):
            return served
        name, _, variant = model.rpartition(":")
        served, variant = self._named(name), variant.lower()
        if served and variant in _SAME:
            return served
        if served and variant in _ABSENT:
            code = _ABSENT[variant]
            availability = Availability(code, fallback_models=(served.slug,))
            what = f"No endpoints found for {model}."
            raise RequestError(what, 404, "not_found", availability=availability)
        if served and variant == "online":
            raise RequestError(f"{model}: there is no web search here; ask {served.slug}")
        availability = Availability("model_not_found")
        raise RequestError(f"{model} is not a valid model ID", availability=availability)

    def _named(self, word: str) -> Served | None:
        """As it is written, else in any case."""
        if word.startswith("~") and word.lower().endswith(_LATEST):
            return self._latest(word[1 : -len(_LATEST)].lower())
        as_written: Callable[[str], str] = str
        for spelled in (as_written, str.lower):
            for served in self.models:
                if spelled(word) in (spelled(served.slug), spelled(served.name)):
                    return served
        return None

    def _latest(self, family: str) -> Served | None:
        """The newest model that is called so, or so and more after a hyphen."""
        kin = [
            served for served in self.models if f"{served.slug}-".lower().startswith(f"{family}-")
        ]
        return max(kin, key=lambda served: served.created, default=None)

    async def is_ready(self) -> bool:
        """Whether every model can be asked now."""
        return not self.is_draining and all(
            [await served.engine.is_healthy() for served in self.models]
        )
