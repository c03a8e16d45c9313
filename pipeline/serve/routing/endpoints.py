"""Every endpoint of a model: the engine here first, then servers elsewhere that may stand in."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.engine.protocol import Lane
from pipeline.serve.asking.batch_tokenizer import BatchTokenizer
from pipeline.serve.asking.reasoning import shows_reasoning
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.books.measured import UNMEASURED, Measured
from pipeline.serve.offer.catalog import Served, Upstream
from pipeline.serve.offer.door import Door
from pipeline.serve.offer.price import Price
from pipeline.serve.replying.events import Tally
from pipeline.serve.routing.endpoint import Answering, Endpoint, Look, Own
from pipeline.serve.routing.measuring import Measuring
from pipeline.serve.routing.upstream import SUPPORTED, Elsewhere


@dataclass(frozen=True)
class Away:
    """A server elsewhere as the endpoint of a model here."""

    served: Served
    elsewhere: Elsewhere
    quantization: str | None = None
    keeps_nothing: bool = False
    """Nobody here can know."""
    artefact_hash: str | None = None
    parameters: frozenset[str] = SUPPORTED
    door: Door = field(default_factory=Door)
    """It turns away by itself whom it has no room for."""
    look: Look = field(default=lambda _place: UNMEASURED)

    @property
    def provider(self) -> str:
        """As the operator calls it."""
        return self.elsewhere.upstream.provider

    @property
    def tag(self) -> str:
        """The same in lower case, with hyphens for all that is no letter and no digit."""
        return re.sub(r"[^a-z0-9]+", "-", self.provider.lower()).strip("-")

    @property
    def price(self) -> Price | None:
        """None if it says by itself what a reply has cost."""
        return self.elsewhere.upstream.price

    @property
    def measured(self) -> Measured:
        """By the ledger."""
        return self.look((self.served.slug, self.provider))

    async def is_healthy(self) -> bool:
        """Whether it answers."""
        return await self.elsewhere.is_healthy()

    async def prepare(self, request: ChatRequest, lane: Lane) -> Answering:  # noqa: ARG002
        """What is wrong with a request is for that server to say; lanes are of engines here."""
        tallies = [Tally() for _ in range(request.n or 1)]
        asked = request.max_completion_tokens or request.max_tokens
        wants_echo = request.debug is not None and request.debug.echo_upstream_body
        return Answering(
            self,
            self.elsewhere.answer(request, tallies),
            tallies,
            shows_reasoning(request),
            max_completion_tokens=asked or self.served.max_completion_tokens,
            ignored=self.elsewhere.ignored(request),
            echo=self.elsewhere.body(request) if wants_echo else {},
        )


class Endpoints:
    """Call it with a model. Connections to servers elsewhere are made when first needed."""

    def __init__(self, measuring: Measuring) -> None:
        self._measuring = measuring
        self._tokenizer = BatchTokenizer()
        self._elsewhere: dict[Upstream, Elsewhere] = {}

    def __call__(self, served: Served) -> list[Endpoint]:
        """In the order in which they are tried unless a client wants another; in an event loop."""
        look = self._measuring.latest
        away = [Away(served, self._reached(upstream), look=look) for upstream in served.upstreams]
        return [Own(served, look=look, tokenizer=self._tokenizer), *away]

    async def measure(self, endpoints: Sequence[Endpoint]) -> None:
        """Wait until what was measured of them is not old."""
        places = [(endpoint.served.slug, endpoint.provider) for endpoint in endpoints]
        await asyncio.gather(*map(self._measuring.renew, places))

    async def close(self) -> None:
        """Let go of all of them."""
        await asyncio.gather(*(elsewhere.close() for elsewhere in self._elsewhere.values()))

    def _reached(self, upstream: Upstream) -> Elsewhere:
        if upstream not in self._elsewhere:
            self._elsewhere[upstream] = Elsewhere(upstream)
        return self._elsewhere[upstream]
