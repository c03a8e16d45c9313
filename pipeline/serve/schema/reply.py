"""A reply of chat/completions: chunks of a stream, or one completion, from the same events."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from pipeline.chat import Chat
from pipeline.engine.protocol import TokenLogprob
from pipeline.errors import RequestError
from pipeline.serve.offer.price import usd_number
from pipeline.serve.replying.events import Called, Ended, Event, Said
from pipeline.serve.schema.common import beside, call_id, error_body
from pipeline.serve.skins.skin import Bill, Heading, UsageChunk

KEEP_ALIVE = b": OPENROUTER PROCESSING\n\n"
DONE = b"data: [DONE]\n\n"


def usage_object(bill: Bill) -> dict[str, Any]:
    """Counts by the model's own tokenizer, and what they cost."""
    usage, cost = bill.usage, bill.cost
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "cost": usd_number(cost.total),
        "is_byok": False,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "audio_tokens": 0,
            "video_tokens": 0,
        },
        "cost_details": {
            "upstream_inference_cost": usd_number(cost.total),
            "upstream_inference_prompt_cost": usd_number(cost.prompt),
            "upstream_inference_completions_cost": usd_number(cost.completion),
        },
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "image_tokens": 0,
            "audio_tokens": 0,
        },
    }


def _reasoning_details(text: str) -> list[dict[str, Any]]:
    # ai-sdk drops reasoning of any other format on the next turn.
    return [{"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}]


def logprobs_object(chat: Chat, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Tokens of an answer as text and bytes: one that is part of a character is no text alone."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = chat.token_bytes(token_id)
        text = token.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(token)}

    content = [
        entry(token.id, token.logprob) | {"top_logprobs": [entry(*other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


@dataclass(frozen=True)
class ChatStyle:
    """Where servers that speak chat/completions differ."""

    usage_chunk: UsageChunk = "empty"
    has_reasoning_content: bool = False
    """Whether reasoning also stands under the name that engines have for it, for routers."""


USUAL = ChatStyle()


class ChatWriter:
    """A Writer of chat/completions."""

    def __init__(self, heading: Heading, style: ChatStyle = USUAL) -> None:
        self._heading = heading
        self._style = style
        self._last_end: list[dict[str, Any]] = []
        self._completions = [Completion(index) for index in range(heading.num_choices)]

    def begin(self, echo: dict[str, Any] | None) -> bytes:
        """A chunk of its own for the engine's order, if it is wanted."""
        if echo is None:
            return KEEP_ALIVE
        return KEEP_ALIVE + frame(self._chunk([], debug={"echo_upstream_body": echo}))

    def frames(self, index: int, event: Event) -> bytes:
        """An event of a choice as chunks."""
        if isinstance(event, Said):
            choice = _choice(index, self._said(event))
            if event.logprobs:
                choice["logprobs"] = logprobs_object(self._heading.chat, event.logprobs)
            return frame(self._chunk([choice]))
        if isinstance(event, Called):
            chunks = [self._chunk([_choice(index, delta)]) for delta in _called(event)]
            return b"".join(map(frame, chunks))
        end = {"role": "assistant", "content": ""}
        self._last_end = [_choice(index, end, event.finish, event.native_finish)]
        return frame(self._chunk(self._last_end))

    def finish(self, bill: Bill) -> bytes:
        """The usage, in a chunk of its own."""
        choices = self._last_end if self._style.usage_chunk == "repeat" else []
        return frame({**self._chunk(choices), **ending(bill)}) + DONE

    def fail(self, error: RequestError, bill: Bill) -> bytes:  # noqa: ARG002 - others bill here
        """The one event that ends a stream which has broken."""
        choice = _choice(0, {"content": ""}, "error", "error")
        return frame(self._chunk([choice], **error_body(error))) + DONE

    def add(self, index: int, event: Event) -> None:
        """Take the next event of a choice."""
        self._completions[index].add(event)

    def body(self, bill: Bill, error: RequestError | None) -> dict[str, Any]:
        """The whole of a reply that is not streamed."""
        heading = self._heading
        choices = [completion.choice(heading, error) for completion in self._completions]
        if self._style.has_reasoning_content:
            for choice in choices:
                choice["message"]["reasoning_content"] = choice["message"]["reasoning"]
        return {
            "id": heading.id,
            "object": "chat.completion",
            "created": heading.created,
            "model": heading.model,
            "provider": heading.provider,
            "system_fingerprint": None,
            "service_tier": None,
            "choices": choices,
            **ending(bill),
        }

    def _said(self, event: Said) -> dict[str, Any]:
        if event.channel == "answer":
            return {"role": "assistant", "content": event.text}
        twice = {"reasoning_content": event.text} if self._style.has_reasoning_content else {}
        return {
            "role": "assistant",
            "content": "",
            "reasoning": event.text,
            "reasoning_details": _reasoning_details(event.text),
            **twice,
        }

    def _chunk(self, choices: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        return {
            "id": self._heading.id,
            "object": "chat.completion.chunk",
            "created": self._heading.created,
            "model": self._heading.model,
            "provider": self._heading.provider,
            **others,
            "choices": choices,
        }


def frame(value: dict[str, Any]) -> bytes:
    """One event of a stream, without a name."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def ending(bill: Bill) -> dict[str, Any]:
    """What the last object of a reply says beside its choices."""
    return {"usage": usage_object(bill), **beside(bill.metadata)}


def _choice(
    index: int, delta: dict[str, Any], finish: str | None = None, native_finish: str | None = None
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "finish_reason": finish,
        "native_finish_reason": native_finish,
    }


def _called(event: Called) -> list[dict[str, Any]]:
    """A call as two deltas: clients run it once its arguments parse, so the first has none."""
    first = {
        "index": event.index,
        "id": call_id(),
        "type": "function",
        "function": {"name": event.call.name, "arguments": ""},
    }
    second = {
        "index": event.index,
        "type": "function",
        "function": {"arguments": event.call.arguments},
    }
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]} for call in (first, second)
    ]


@dataclass
class Completion:
    """One choice of a reply that is not streamed, gathered from the same events."""

    index: int
    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: Ended | None = None

    def add(self, event: Event) -> None:
        """Take the next event."""
        if isinstance(event, Ended):
            self.end = event
        elif isinstance(event, Called):
            function = {"name": event.call.name, "arguments": event.call.arguments}
            call = {"index": event.index, "id": call_id(), "type": "function"}
            self.calls.append({**call, "function": function})
        elif event.channel == "reasoning":
            self.reasoning += event.text
        else:
            self.content += event.text
            self.logprobs += event.logprobs

    def choice(self, heading: Heading, error: RequestError | None) -> dict[str, Any]:
        """A reply that broke keeps what there was and says so."""
        end = self.end
        tokens = logprobs_object(heading.chat, self.logprobs) if heading.has_logprobs else None
        choice: dict[str, Any] = {
            "index": self.index,
            "logprobs": tokens,
            "finish_reason": end.finish if end else "error",
            "native_finish_reason": end.native_finish if end else "error",
            "message": self._message(),
        }
        return choice | (error_body(error) if error is not None else {})

    def _message(self) -> dict[str, Any]:
        # null only where there was no answer to give: calls instead, or cut off before it.
        is_empty = not self.content and (self.calls or not self.end or self.end.finish != "stop")
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if is_empty else self.content,
            "refusal": None,
            "reasoning": self.reasoning or None,
        }
        if self.reasoning:
            message["reasoning_details"] = _reasoning_details(self.reasoning)
        if self.calls:
            message["tool_calls"] = self.calls
        return message
