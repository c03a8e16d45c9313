"""OpenRouter's own dialect, chat/completions: what every other is translated to."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import RequestError
from pipeline.serve.asking.request import ChatRequest, check_request
from pipeline.serve.schema.common import error_body
from pipeline.serve.schema.completions import TextWriter
from pipeline.serve.schema.reply import KEEP_ALIVE, USUAL, ChatStyle, ChatWriter
from pipeline.serve.skins.skin import Body, Heading, Writer


@dataclass(frozen=True)
class Chat:
    """A Skin."""

    style: ChatStyle = USUAL
    keep_alive: bytes = KEEP_ALIVE

    def read(self, values: Body) -> ChatRequest:
        """As it stands."""
        return check_request(values)

    def writer(self, heading: Heading) -> Writer:
        """For one reply; a `prompt` in place of messages is answered with `text`."""
        is_text = not heading.values.get("messages")
        return TextWriter(heading) if is_text else ChatWriter(heading, self.style)

    def error_body(
        self, error: RequestError, asked_models: Sequence[str], metadata: Body | None = None
    ) -> Body:
        """The shape that all other routes have, too."""
        return error_body(error, asked_models, metadata)


CHAT = Chat()
