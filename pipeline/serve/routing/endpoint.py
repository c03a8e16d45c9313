"""Who may answer a request for a model: the engine here, or servers elsewhere."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.engine.protocol import Lane
from pipeline.serve.asking.batch_tokenizer import BatchTokenizer
from pipeline.serve.asking.draft import is_short, make_draft
from pipeline.serve.asking.order import Order, decide, must_be_compressed, settle
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.books.measured import UNMEASURED, Measured
from pipeline.serve.offer.catalog import Served
from pipeline.serve.offer.door import Door
from pipeline.serve.offer.price import Price
from pipeline.serve.replying.choices import Indexed, answer_all
from pipeline.serve.replying.events import Tally, Usage
from pipeline.serve.routing.measuring import Place
from pipeline.serve.schema import PROVIDER, supported_parameters

Look = Callable[[Place], Measured]
"""What is known of a place."""


def _unseen(_place: Place) -> Measured:
    return UNMEASURED


@dataclass(frozen=True)
class Answering:
    """A reply that is about to be made: nothing is asked of an engine until it is read."""

    endpoint: "Endpoint"
    replies: AsyncGenerator[Indexed, None]
    tallies: list[Tally]
    """One for each choice, kept up to date before each event."""
    shows_reasoning: bool = True
    has_logprobs: bool = False
    num_prompt_tokens: int = 0
    """0 if they are counted elsewhere."""
    max_completion_tokens: int = 0
    """Of each choice."""
    ignored: tuple[str, ...] = ()
    """Request fields that change nothing there, named to the client."""
    is_compressed: bool = False
    """Whether messages were left out for want of room."""
    echo: dict[str, Any] = field(default_factory=dict)
    """What the engine is asked, for clients that debug."""

    @property
    def most(self) -> Usage:
        """More cannot be used of it."""
        prompt = self.num_prompt_tokens or self.endpoint.served.context_tokens
        return Usage(prompt, self.max_completion_tokens * len(self.tallies))


class Endpoint(Protocol):
    """One place where a model is served."""

    @property
    def served(self) -> Served:
        """The model."""
        ...

    @property
    def provider(self) -> str:
        """What people are told answered."""
        ...

    @property
    def tag(self) -> str:
        """Its slug, and after a slash its variant if there are several."""
        ...

    @property
    def quantization(self) -> str | None:
        """Of the weights there, if that is known."""
        ...

    @property
    def price(self) -> Price | None:
        """None if the endpoint says by itself what a reply has cost."""
        ...

    @property
    def parameters(self) -> frozenset[str]:
        """Those it honours."""
        ...

    @property
    def keeps_nothing(self) -> bool:
        """Whether it is known that no word of a request is stored or learnt from."""
        ...

    @property
    def door(self) -> Door:
        """What every reply from there passes."""
        ...

    @property
    def artefact_hash(self) -> str | None:
        """sha256 of the weights there, if that is known."""
        ...

    @property
    def measured(self) -> Measured:
        """How it has answered lately, as far as that is known without waiting."""
        ...

    async def is_healthy(self) -> bool:
        """Whether it answers."""
        ...

    async def prepare(self, request: ChatRequest, lane: Lane) -> Answering:
        """RequestError for what is refused. The lane's adapter is the endpoint's to choose."""
        ...


@dataclass(frozen=True)
class Own:
    """The engine of a model here."""

    served: Served
    provider: str = PROVIDER
    keeps_nothing: bool = True
    look: Look = _unseen
    tokenizer: BatchTokenizer = field(default_factory=BatchTokenizer, compare=False)

    @property
    def tag(self) -> str:
        """pipeline, or pipeline/bf16."""
        slug, quantization = self.provider.lower(), self.served.quantization
        return f"{slug}/{quantization}" if quantization else slug

    @property
    def quantization(self) -> str | None:
        """Of the weights that answer."""
        return self.served.quantization

    @property
    def price(self) -> Price:
        """Of the model."""
        return self.served.price

    @property
    def parameters(self) -> frozenset[str]:
        """What the dialogue does, and what the engine does."""
        return frozenset(supported_parameters(self.served.engine.capabilities))

    @property
    def artefact_hash(self) -> str | None:
        """Of the weights that answer."""
        return self.served.artefact_hash

    @property
    def measured(self) -> Measured:
        """By the ledger."""
        return self.look((self.served.slug, self.provider))

    @property
    def door(self) -> Door:
        """Of the engine."""
        return self.served.door

    async def is_healthy(self) -> bool:
        """Whether the engine answers."""
        return await self.served.engine.is_healthy()

    async def prepare(self, request: ChatRequest, lane: Lane) -> Answering:
        """RequestError for what is refused."""
        served, order = self.served, await self.order(request, lane)
        tallies = [Tally() for _ in range(order.num_choices)]
        return Answering(
            self,
            answer_all(order, served.chat, served.engine, tallies),
            tallies,
            order.shows_reasoning,
            order.top_logprobs is not None,
            len(order.prompt_ids),
            order.sampling.max_tokens,
            order.ignored,
            order.is_compressed,
            _echo(order, served) if request.debug and request.debug.echo_upstream_body else {},
        )

    async def order(self, request: ChatRequest, lane: Lane) -> Order:
        """What `decide` gives, or raises; tokenising does not hold up this engine's streams."""
        served = self.served
        if not is_short(request):
            return await asyncio.to_thread(decide, request, served, lane)
        draft = make_draft(request, served)
        if served.door.num_inside:
            texts = draft.render(draft.messages)
            prompt_ids = await self.tokenizer.encode(served.chat, texts)
        else:  # a thread takes half a millisecond to answer
            prompt_ids = draft.encode(draft.messages)
        if must_be_compressed(draft, len(prompt_ids)):
            return await asyncio.to_thread(settle, draft, prompt_ids, lane)
        return settle(draft, prompt_ids, lane)


def _echo(order: Order, served: Served) -> dict[str, Any]:
    """The engine's order in the API's words."""
    sampling = {name: value for name, value in vars(order.sampling).items() if value is not None}
    for name in ("stop_tokens", "is_repeatable", "grammar"):
        sampling.pop(name, None)
    bias = {str(token): value for token, value in order.sampling.logit_bias.items()}
    return {
        "model": served.slug,
        "prompt": served.chat.decode(order.prompt_ids),
        **sampling,
        "logit_bias": bias,
        "stop": list(order.stops),
        "reasoning": {"enabled": order.mode == "thinking", "max_tokens": order.budget},
        "grammar": order.constraints.answer or order.constraints.calls,
    }
