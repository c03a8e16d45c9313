"""A continued text as the legacy /completions has it: chunks of a stream, or one whole object."""

import codecs
from collections.abc import Sequence
from typing import Any

from pipeline.chat import Chat
from pipeline.engine.protocol import TokenLogprob
from pipeline.errors import RequestError
from pipeline.serve.replying.events import Ended, Event, Said
from pipeline.serve.schema.common import error_body
from pipeline.serve.schema.reply import DONE, KEEP_ALIVE, ending, frame
from pipeline.serve.skins.skin import Bill, Body, Heading


class TextWriter:
    """A Writer. Its events are bits of the answer, and ends: there is no dialogue to call in."""

    def __init__(self, heading: Heading) -> None:
        self._heading = heading
        self._choices = [_Choice(index, heading.chat) for index in range(heading.num_choices)]

    def begin(self, echo: Body | None) -> bytes:
        """A chunk of its own for the engine's order, if it is wanted."""
        if echo is None:
            return KEEP_ALIVE
        return KEEP_ALIVE + frame(self._object([], debug={"echo_upstream_body": echo}))

    def frames(self, index: int, event: Event) -> bytes:
        """An event of a choice as a chunk."""
        chunk = self._choices[index].chunk(event)
        return frame(self._object([chunk])) if chunk else b""

    def finish(self, bill: Bill) -> bytes:
        """The usage, in a chunk without choices."""
        return frame(self._object([]) | ending(bill)) + DONE

    def fail(self, error: RequestError, bill: Bill) -> bytes:  # noqa: ARG002 - it is not told
        """The one event that ends a stream which has broken."""
        broken = _choice(0, "", None, "error", "error")
        return frame(self._object([broken], **error_body(error))) + DONE

    def add(self, index: int, event: Event) -> None:
        """Take the next event of a choice."""
        self._choices[index].add(event)

    def body(self, bill: Bill, error: RequestError | None) -> Body:
        """A text that broke off is kept as far as it went, and says so."""
        has_logprobs = self._heading.has_logprobs
        choices = [choice.whole(has_logprobs) for choice in self._choices]
        if error is not None:
            choices = [choice | error_body(error) for choice in choices]
        return self._object(choices) | ending(bill)

    def _object(self, choices: list[Body], **others: Any) -> Body:
        return {
            "id": self._heading.id,
            "object": "text_completion",
            "created": self._heading.created,
            "model": self._heading.model,
            "provider": self._heading.provider,
            **others,
            "choices": choices,
        }


class _Choice:
    def __init__(self, index: int, chat: Chat) -> None:
        self._index = index
        self._tokens = _Tokens(chat)
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._end: Ended | None = None

    def chunk(self, event: Event) -> Body | None:
        if isinstance(event, Ended):
            return _choice(self._index, "", None, event.finish, event.native_finish)
        if not isinstance(event, Said):
            return None
        logprobs = self._tokens.told(event.logprobs) if event.logprobs else None
        return _choice(self._index, event.text, logprobs)

    def add(self, event: Event) -> None:
        if isinstance(event, Ended):
            self._end = event
        elif isinstance(event, Said):
            self._texts.append(event.text)
            self._logprobs += event.logprobs

    def whole(self, has_logprobs: bool) -> Body:
        logprobs = self._tokens.told(self._logprobs) if has_logprobs else None
        finish = self._end.finish if self._end else "error"
        native_finish = self._end.native_finish if self._end else "error"
        return _choice(self._index, "".join(self._texts), logprobs, finish, native_finish)


class _Tokens:
    """The tokens of one choice: each is told with its place in the text."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def told(self, tokens: Sequence[TokenLogprob]) -> Body:
        """The legacy form: lists side by side."""
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": [self._place(token) for token in tokens],
        }

    def _likeliest(self, token: TokenLogprob) -> Body:
        """And the drawn one, which need not be among them."""
        likeliest = {self._name(other): logprob for other, logprob in token.top}
        return likeliest | {self._name(token.id): token.logprob}

    def _place(self, token: TokenLogprob) -> int:
        """Characters before it; a part of a character stands where that begins."""
        place = self._num_characters
        self._num_characters += len(self._decoder.decode(self._chat.token_bytes(token.id)))
        return place

    def _name(self, token_id: int) -> str:
        token = self._chat.token_bytes(token_id)
        try:
            return token.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _choice(
    index: int,
    text: str,
    logprobs: Body | None,
    finish: str | None = None,
    native_finish: str | None = None,
) -> Body:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish,
        "native_finish_reason": native_finish,
    }
