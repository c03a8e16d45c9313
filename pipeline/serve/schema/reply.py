"""A reply on the wire: chunks of a stream, or one whole completion, from the same events."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat import Chat
from pipeline.engine.protocol import TokenLogprob
from pipeline.errors import RequestError
from pipeline.serve.events import Called, Ended, Event, Said, Usage
from pipeline.serve.schema.common import PROVIDER, call_id, error_body

KEEP_ALIVE = b": OPENROUTER PROCESSING\n\n"
DONE = b"data: [DONE]\n\n"


def usage_object(usage: Usage) -> dict[str, Any]:
    """Counts by the model's own tokenizer; everything is free."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "cost": 0,
        "is_byok": False,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "audio_tokens": 0,
            "video_tokens": 0,
        },
        "cost_details": {
            "upstream_inference_cost": 0,
            "upstream_inference_prompt_cost": 0,
            "upstream_inference_completions_cost": 0,
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
class Heading:
    """What all objects of one reply begin with."""

    id: str
    created: int
    model: str
    chat: Chat
    has_logprobs: bool = False

    def chunk(self, choices: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        """One chunk of a stream."""
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "provider": PROVIDER,
            **others,
            "choices": choices,
        }

    def chunks(self, index: int, event: Event) -> list[dict[str, Any]]:
        """An event of a choice as chunks."""
        if isinstance(event, Said):
            choice = _choice(index, _said(event))
            if event.logprobs:
                choice["logprobs"] = logprobs_object(self.chat, event.logprobs)
            return [self.chunk([choice])]
        if isinstance(event, Called):
            return [self.chunk([_choice(index, delta)]) for delta in _called(event)]
        end = {"role": "assistant", "content": ""}
        return [self.chunk([_choice(index, end, event.finish, event.native_finish)])]

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last one."""
        return {**self.chunk([]), "usage": usage_object(usage)}

    def error_chunk(self, error: RequestError) -> dict[str, Any]:
        """The one event that ends a stream which has broken."""
        return self.chunk([_choice(0, {"content": ""}, "error", "error")], **error_body(error))


def _choice(
    index: int, delta: dict[str, Any], finish: str | None = None, native_finish: str | None = None
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "finish_reason": finish,
        "native_finish_reason": native_finish,
    }


def _said(event: Said) -> dict[str, Any]:
    if event.channel == "answer":
        return {"role": "assistant", "content": event.text}
    return {
        "role": "assistant",
        "content": "",
        "reasoning": event.text,
        "reasoning_details": _reasoning_details(event.text),
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


def completion_body(
    heading: Heading,
    completions: Sequence[Completion],
    usage: Usage,
    error: RequestError | None = None,
) -> dict[str, Any]:
    """The whole of a reply that is not streamed."""
    return {
        "id": heading.id,
        "object": "chat.completion",
        "created": heading.created,
        "model": heading.model,
        "provider": PROVIDER,
        "system_fingerprint": None,
        "service_tier": None,
        "choices": [completion.choice(heading, error) for completion in completions],
        "usage": usage_object(usage),
    }
