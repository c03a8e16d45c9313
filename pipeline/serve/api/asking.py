"""One request on its way to an answer: what was asked, by whom, and where it may be answered."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.engine.protocol import Lane
from pipeline.serve.api.exchange import Exchange, Opening
from pipeline.serve.api.record import Arrival
from pipeline.serve.api.repeating import Repeating
from pipeline.serve.api.sending import STREAM_HEADERS
from pipeline.serve.asking.request import HEALING, ChatRequest
from pipeline.serve.books.allowance import PRIORITIES
from pipeline.serve.offer.door import ANYBODY, Guest
from pipeline.serve.routing.endpoint import Answering, Endpoint
from pipeline.serve.routing.route import Route
from pipeline.serve.schema.metadata import Attempt, metadata_body
from pipeline.serve.skins.skin import Body, Heading, Skin

_SALT_DIGITS = 32
_WANTS_METADATA = ("x-openrouter-metadata", "x-openrouter-experimental-metadata")


@dataclass(frozen=True)
class Asking:
    """One request on its way to an answer."""

    exchange: Exchange
    skin: Skin
    arrival: Arrival
    values: Body
    """Its body."""
    request: ChatRequest
    route: Route
    repeating: Repeating | None = None
    """None if its answer must be made for it alone."""
    attempts: list[Attempt] = field(default_factory=list)

    def heading(self, endpoint: Endpoint, **others: Any) -> Heading:
        """Of a reply from there."""
        served, arrival = endpoint.served, self.arrival
        return Heading(
            arrival.id,
            arrival.created,
            served.slug,
            endpoint.provider,
            served.chat,
            self.values,
            **others,
        )

    def metadata(self, answering: Answering | None, stages: Sequence[str] = ()) -> Body | None:
        """None if the client does not want it, and for a reply that was not made for it."""
        headers = self.exchange.headers
        if not self.attempts or all(
            headers.get(name, "").lower() != "enabled" for name in _WANTS_METADATA
        ):
            return None
        return metadata_body(self.route, self.attempts, answering, stages)

    @property
    def opening(self) -> Opening:
        """What a response begins with that has kept its client waiting for too long."""
        headers = {"X-Generation-Id": self.arrival.id}
        if self.request.stream:
            headers = {**STREAM_HEADERS, **headers}
            return Opening("text/event-stream", headers, self.skin.keep_alive)
        return Opening("application/json", headers, b" ")

    @property
    def lane(self) -> Lane:
        """What one key's requests leave in an engine's cache is not for another's to find."""
        key, session = self.arrival.key, self.arrival.session(self.request)
        return Lane(cache_salt=key.hash[:_SALT_DIGITS] if key else "", session=session or "")

    @property
    def guest(self) -> Guest:
        """Whose place it takes in a queue."""
        key = self.arrival.key
        return Guest(key.id, PRIORITIES[key.priority]) if key else ANYBODY

    @property
    def is_healed(self) -> bool:
        """Whether its answer is to be repaired where it is not quite JSON."""
        form = self.request.response_format
        is_json = form is not None and form.type in ("json_object", "json_schema")
        return is_json and self.request.has_plugin(HEALING)
