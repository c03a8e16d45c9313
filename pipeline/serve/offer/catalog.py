"""The models a server offers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat import Chat
from pipeline.engine.protocol import Engine
from pipeline.errors import Availability, EngineDown, RequestError
from pipeline.serve.offer.door import Door
from pipeline.serve.offer.price import FREE, Price
from pipeline.serve.offer.provider import UNLISTED, Listing

AUTHOR = "local"
# What OpenRouter lets follow a model's id. The first few choose among providers, or say what this
# server does anyway: a model thinks unless the request says otherwise.
_SAME = frozenset(["exacto", "floor", "nitro", "thinking"])
_ABSENT = {"extended": "no_endpoints", "free": "free_variant_ended"}
_LATEST = "-latest"


@dataclass(frozen=True)
class Upstream:
    """A server elsewhere that speaks this API, asked when the engine here is down or full."""

    url: str
    """Its base: what precedes /chat/completions."""
    key: str = field(repr=False)
    """Its API key."""
    model: str
    """What it calls the model."""
    provider: str
    """What people are told answered."""
    price: Price | None = None
    """None is what it says itself that a reply has cost."""


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
    """For the books: sha256 of what answers, where it lies here and it was written down."""
    title: str = ""
    """What people call it; empty is its name."""
    about: str = ""
    """A sentence or more for a catalogue."""
    variant: str = ""
    """What follows the colon in its slug: free or extended; empty is the model itself."""
    price: Price = FREE
    quantization: str | None = None
    """bf16, fp8, int4, … as OpenRouter names them; None is not known."""
    max_tokens: int | None = None
    """A reply is never longer, reasoning included; None is bounded by the context alone."""
    max_context_tokens: int | None = None
    """Less than the engine's own, if a shorter context is sold; None is the engine's."""
    compress_short: bool = False
    """Whether a context of few tokens has prompts compressed unless a request says no."""
    aliases: tuple[str, ...] = ()
    """Other ids that clients may call it by."""
    hugging_face_id: str | None = None
    upstreams: tuple[Upstream, ...] = ()
    """Asked in this order."""
    door: Door = field(default_factory=Door)
    """Of the engine: shared by all models that it makes."""
    listing: Listing = UNLISTED

    @property
    def slug(self) -> str:
        """What clients call it."""
        return f"{self.author}/{self.name}" + (f":{self.variant}" if self.variant else "")

    @property
    def ids(self) -> tuple[str, ...]:
        """Every word that means it."""
        return (self.slug, self.slug.partition("/")[2], *self.aliases)

    @property
    def shown_title(self) -> str:
        """What people call it."""
        return self.title or self.name

    @property
    def context_tokens(self) -> int:
        """Prompt and completion together may be this long."""
        own = self.engine.context_tokens
        return min(own, self.max_context_tokens) if self.max_context_tokens else own

    @property
    def max_completion_tokens(self) -> int:
        """A reply may be this long."""
        whole = self.context_tokens
        return min(whole, self.max_tokens) if self.max_tokens else whole


@dataclass
class Catalog:
    """Every model on offer; the first is the default.

    `models` and `presets` may be replaced while requests run, which keep what they have found.
    """

    models: Sequence[Served]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fields that a request has unless it says otherwise, by what follows @preset/."""
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
            if other := self._variant(served, variant):
                return other
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
                if spelled(word) in map(spelled, served.ids):
                    return served
        return None

    def _variant(self, served: Served, variant: str) -> Served | None:
        """What is on offer beside a model, by a name or alias of which it was asked for."""
        wanted = (served.author, served.name, variant)
        offered = (m for m in self.models if (m.author, m.name, m.variant) == wanted)
        return None if served.variant else next(offered, None)

    def _latest(self, family: str) -> Served | None:
        """The newest model that is called so, or so and more after a hyphen."""
        kin = [
            served
            for served in self.models
            if not served.variant and f"{served.slug}-".lower().startswith(f"{family}-")
        ]
        return max(kin, key=lambda served: served.created, default=None)

    async def is_ready(self) -> bool:
        """Whether every model can be asked now."""
        return not self.is_draining and all(
            [await served.engine.is_healthy() for served in self.models]
        )
