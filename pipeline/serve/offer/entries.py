"""What a menu comes to: each engine that is wanted, and the models that it makes."""

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.chat import Chat
from pipeline.engine.choose import EngineChoice, choose_engine
from pipeline.engine.protocol import Engine
from pipeline.errors import PipelineError
from pipeline.run import Run, hash_value
from pipeline.serve.offer.artefact import Artefact, find_artefact, load
from pipeline.serve.offer.catalog import Served, Upstream
from pipeline.serve.offer.choice import refuse_uncertified
from pipeline.serve.offer.door import Door
from pipeline.serve.offer.engines import EngineSetup, Room
from pipeline.serve.offer.hashes import known_hash
from pipeline.serve.offer.menu import (
    Extended,
    Free,
    Menu,
    Model,
    Source,
    Terms,
    UpstreamSection,
    Usds,
)
from pipeline.serve.offer.provider import Listing

QUEUE_OF_A_SLOT = 8
"""So many requests may wait for each reply that an engine makes at once, unless that is said."""


@dataclass(frozen=True)
class Offer:
    """One model, but for its engine."""

    slug: str
    """Without the variant."""
    terms: Terms
    listing: Listing
    upstreams: tuple[Upstream, ...]
    adapter: str | None = None
    """As the engine calls it."""
    variant: str = ""

    @property
    def ids(self) -> tuple[str, ...]:
        """What no other model may be called."""
        slug = f"{self.slug}:{self.variant}" if self.variant else self.slug
        return (slug, *self.terms.aliases)


@dataclass(frozen=True)
class Entry:
    """An engine, and the models that it makes."""

    source: Source
    room: Room
    artefact: Artefact
    chosen: EngineChoice
    adapters: Mapping[str, Path]
    offers: tuple[Offer, ...]

    def set_up(self) -> EngineSetup:
        """Find its files; GGUF files that llama.cpp lacks are made, which takes minutes."""
        if self.chosen.urls:
            return EngineSetup("elsewhere", self.room, self.chosen.urls)
        files = load(self.artefact, self.adapters, self.chosen.kind)
        found = {"": files.weights, **files.adapters}
        state = tuple((name, _state(path)) for name, path in found.items())
        logs = self.artefact.run.folder / "logs" if self.artefact.run else None
        return EngineSetup(self.chosen.kind, self.room, (), files, logs, state)

    def serve(self, setup: EngineSetup, chat: Chat, engine: Engine, door: Door) -> list[Served]:
        """Its models, once there is the engine."""
        served = []
        for offer in self.offers:
            author, _, name = offer.slug.partition("/")
            terms = offer.terms
            served.append(
                Served(
                    name,
                    chat,
                    engine,
                    self._created(setup, offer.adapter),
                    offer.adapter,
                    author,
                    "url" if setup.urls else setup.kind,
                    self._hash(setup, offer.adapter),
                    title=terms.title,
                    about=terms.about,
                    variant=offer.variant,
                    price=terms.price.price,
                    quantization=terms.quantization,
                    max_tokens=terms.max_tokens,
                    max_context_tokens=terms.context,
                    compress_short=terms.compression == "short_context",
                    aliases=terms.aliases,
                    hugging_face_id=terms.hugging_face_id,
                    upstreams=offer.upstreams,
                    door=door,
                    listing=offer.listing,
                )
            )
        return served

    def max_inside(self, setup: EngineSetup) -> int | None:
        """How many requests its engine may have before it; None is any number."""
        if setup.slots is None:
            return None
        queue = self.source.queue
        return setup.slots + (QUEUE_OF_A_SLOT * setup.slots if queue is None else queue)

    def _hash(self, setup: EngineSetup, adapter: str | None) -> str | None:
        """Of the weights that answer; of those and an adapter's, one over both."""
        chosen = self.artefact.chosen
        weights = chosen.gguf or chosen.checkpoint
        if setup.load is None or weights is None:
            return None
        parts = [weights]
        if adapter:
            folder = self.adapters.get(adapter) or chosen.adapter or setup.load.adapters[adapter]
            trained = Run(folder).adapter
            parts.append(trained if trained.is_dir() else folder)
        hashes = [known_hash(part) for part in parts]
        if None in hashes:
            return None
        return hash_value(hashes) if adapter else hashes[0]

    def _created(self, setup: EngineSetup, adapter: str | None) -> int:
        if setup.load is None:
            file = self.artefact.tokenizer
        else:
            file = setup.load.adapters[adapter] if adapter else setup.load.weights
        return int(file.stat().st_mtime)


def read_entries(menu: Menu) -> list[Entry]:
    """PipelineError, or GateMissed, for what cannot or must not be served."""
    entries = [entry for model in menu.models for entry in _entries_of(model, menu.listing)]
    seen: set[str] = set()
    for word in (word for entry in entries for offer in entry.offers for word in offer.ids):
        if word in seen:
            raise PipelineError(f"two models would be called {word}")
        seen.add(word)
    slugs = [offer.ids[0] for entry in entries for offer in entry.offers]
    if menu.default and menu.default not in slugs:
        raise PipelineError(f"default: {menu.default} is not among {', '.join(slugs)}")
    return entries


def _entries_of(model: Model, listing: Listing) -> Iterator[Entry]:
    artefact, chosen = _find(model)
    slug = model.slug or artefact.slug
    own = artefact.slug if artefact.chosen.adapter else None
    if own in model.adapters:
        raise PipelineError(f"{own} is the run's own adapter: give the other one another slug")
    offers = [_offer(slug, model, listing, own)]
    offers += _free(offers[0], model.variants.free)
    for name, adapter in model.adapters.items():
        made = _offer(name, adapter, listing, name)
        offers += [made, *_free(made, adapter.variants.free)]
    adapters = {name: adapter.path for name, adapter in model.adapters.items()}
    yield Entry(model, _room(model), artefact, chosen, adapters, tuple(offers))
    if longer := model.variants.extended:
        yield _extended(longer, model, slug, listing)


def _extended(longer: Extended, model: Model, slug: str, listing: Listing) -> Entry:
    artefact, chosen = _find(longer)
    own = artefact.slug if artefact.chosen.adapter else None
    said = {
        "title": longer.title or _titled(model.title, slug, "extended"),
        "about": longer.about or model.about,
        "hugging_face_id": longer.hugging_face_id or model.hugging_face_id,
        "listing": longer.listing or model.listing,
    }
    offer = _offer(slug, longer.model_copy(update=said), listing, own, "extended")
    return Entry(longer, _room(longer), artefact, chosen, {}, (offer,))


def _free(offer: Offer, free: Free | None) -> Sequence[Offer]:
    """Nobody else is asked for nothing: an upstream has a price."""
    if free is None:
        return ()
    terms = offer.terms
    said = {
        "title": _titled(terms.title, offer.slug, "free"),
        "price": Usds(),
        "context": free.context or terms.context,
        "max_tokens": free.max_tokens or terms.max_tokens,
        "aliases": (),
    }
    terms = terms.model_copy(update=said)
    return (Offer(offer.slug, terms, offer.listing, (), offer.adapter, "free"),)


def _offer(
    slug: str, terms: Terms, listing: Listing, adapter: str | None, variant: str = ""
) -> Offer:
    upstreams = tuple(map(_upstream, terms.upstreams))
    return Offer(slug, terms, terms.listing or listing, upstreams, adapter, variant)


def _titled(title: str, slug: str, variant: str) -> str:
    return f"{title or slug.partition('/')[2]} ({variant})"


def _upstream(said: UpstreamSection) -> Upstream:
    key = os.environ.get(said.key_env, "")
    if not key:
        raise PipelineError(
            f"the key to {said.url} should be in {said.key_env}, which is not set where the server "
            "was started"
        )
    price = said.price.price if said.price else None
    return Upstream(said.url, key, said.model, said.provider, price)


def _find(source: Source) -> tuple[Artefact, EngineChoice]:
    """What is served, and by which engine."""
    word = ",".join(source.urls) or source.engine
    chosen = choose_engine(word, is_gguf=source.path.suffix == ".gguf")
    artefact = find_artefact(source.path, source.artefact, chosen.kind)
    refuse_uncertified(artefact.folder, artefact.chosen)
    return artefact, chosen


def _room(source: Model | Extended) -> Room:
    return Room(source.slots, source.context, source.gpu_memory)


def _state(path: Path) -> Hashable:
    """Of a file, or of a folder's files: another one if they have been written since."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = ((file, file.stat()) for file in files if file.is_file())
    return tuple((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in stats)
