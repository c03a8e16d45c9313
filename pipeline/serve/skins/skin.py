"""What a skin is: one dialect of asking and of being answered, over the one internal request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pipeline.chat import Chat
from pipeline.errors import RequestError
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.offer.price import NOTHING, Cost
from pipeline.serve.replying.events import Event, Usage

Body = dict[str, Any]
UsageChunk = Literal["empty", "repeat"]
"""Whether the chunk with a stream's usage has no choices, or the end of the last one again."""


@dataclass(frozen=True)
class Heading:
    """What is known of a reply before its first event."""

    id: str
    """The generation's, `gen-…`."""
    created: int
    """Unix seconds."""
    model: str
    """The slug of the model that answers."""
    provider: str
    """The name of who answers: this server, or one that it has asked in turn."""
    chat: Chat
    """For the text of tokens whose log-probabilities are told."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The request's body as the client sent it, for dialects that repeat it."""
    has_logprobs: bool = False
    num_choices: int = 1
    num_prompt_tokens: int = 0
    """0 if they are counted elsewhere."""


@dataclass(frozen=True)
class Bill:
    """What a reply has used, and what is said beside it at its end."""

    usage: Usage
    cost: Cost = NOTHING
    metadata: Body | None = None
    """`openrouter_metadata`, if the client wants it."""


class Writer(Protocol):
    """One reply in one dialect. Either `stream_…` and `finish` or `fail`, or `add` and `body`.

    Events whose reasoning the client does not want to see never reach it.
    """

    def begin(self, echo: Body | None) -> bytes:
        """What a stream begins with; `echo` is the engine's order, for clients that debug."""
        ...

    def frames(self, index: int, event: Event) -> bytes:
        """An event of a choice, for a stream; may be empty."""
        ...

    def finish(self, bill: Bill) -> bytes:
        """How a stream ends that went well."""
        ...

    def fail(self, error: RequestError, bill: Bill) -> bytes:
        """How a stream ends that broke."""
        ...

    def add(self, index: int, event: Event) -> None:
        """Take an event of a reply that is not streamed."""
        ...

    def body(self, bill: Bill, error: RequestError | None) -> Body:
        """The whole of a reply that is not streamed; one that broke keeps what there was."""
        ...


class Skin(Protocol):
    """One dialect: reads requests, writes replies and failures."""

    @property
    def keep_alive(self) -> bytes:
        """What fills the gaps of its streams."""
        ...

    def read(self, values: Body) -> ChatRequest:
        """Translate a body; RequestError for what is wrong in it, by the dialect's own names."""
        ...

    def writer(self, heading: Heading) -> Writer:
        """For one reply."""
        ...

    def error_body(
        self, error: RequestError, asked_models: Sequence[str], metadata: Body | None = None
    ) -> Body:
        """A failure before anything was sent; `asked_models` are those that the client named."""
        ...
