"""The wire format: the only place that builds what clients receive."""

import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from pipeline.errors import RequestError
from pipeline.serve.catalog import Served
from pipeline.serve.dialogue import Called, Ended, Said, Usage

PROVIDER = "Pipeline"
KEEP_ALIVE = b": OPENROUTER PROCESSING\n\n"
DONE = b"data: [DONE]\n\n"
INTERNAL_ERROR = "Internal Server Error"
# Only what is honoured, never what is merely accepted.
SUPPORTED_PARAMETERS = (
    "frequency_penalty",
    "include_reasoning",
    "max_completion_tokens",
    "max_tokens",
    "min_p",
    "parallel_tool_calls",
    "presence_penalty",
    "reasoning",
    "repetition_penalty",
    "seed",
    "stop",
    "temperature",
    "tools",
    "top_k",
    "top_p",
)
_LETTERS = string.ascii_letters + string.digits
_MAX_NAMES = 32


def generation_id(created: int) -> str:
    """An id in OpenRouter's form."""
    return f"gen-{created}-" + "".join(secrets.choice(_LETTERS) for _ in range(20))


def ignored_header(names: Sequence[str]) -> str:
    """Names for `X-Ignored-Parameters`; percent-encoded, as a client may send any key."""
    shown = [quote(name[:64], safe="._-~[]") for name in names[:_MAX_NAMES]]
    return ", ".join([*shown, "..."] if len(names) > _MAX_NAMES else shown)


def error_body(error: RequestError) -> dict[str, Any]:
    """The one shape of every failure."""
    metadata = {"error_type": error.error_type}
    return {"error": {"code": error.status, "message": str(error), "metadata": metadata}}


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


def _call_id() -> str:
    return "call_" + "".join(secrets.choice(_LETTERS) for _ in range(24))


def _reasoning_details(text: str) -> list[dict[str, Any]]:
    # ai-sdk drops reasoning of any other format on the next turn.
    return [{"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}]


@dataclass(frozen=True)
class Heading:
    """What all objects of one reply begin with."""

    id: str
    created: int
    model: str

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

    def chunks(self, event: Said | Called | Ended) -> list[dict[str, Any]]:
        """An event as chunks; the end is the finish chunk and the usage chunk."""
        if isinstance(event, Said):
            return [self.chunk([_choice(_said(event))])]
        if isinstance(event, Called):
            return [self.chunk([_choice(delta)]) for delta in _called(event)]
        end = {"role": "assistant", "content": ""}
        return [
            self.chunk([_choice(end, event.finish, event.native_finish)]),
            {**self.chunk([]), "usage": usage_object(event.usage)},
        ]

    def error_chunk(self, error: RequestError) -> dict[str, Any]:
        """The one event that ends a stream which has broken."""
        return self.chunk([_choice({"content": ""}, "error", "error")], **error_body(error))


def _choice(
    delta: dict[str, Any], finish: str | None = None, native_finish: str | None = None
) -> dict[str, Any]:
    return {
        "index": 0,
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
        "id": _call_id(),
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
    """The body of a reply that is not streamed, gathered from the same events."""

    heading: Heading
    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    end: Ended | None = None
    error: RequestError | None = None

    def add(self, event: Said | Called | Ended) -> None:
        """Take the next event."""
        if isinstance(event, Ended):
            self.end = event
        elif isinstance(event, Called):
            function = {"name": event.call.name, "arguments": event.call.arguments}
            call = {"index": event.index, "id": _call_id(), "type": "function"}
            self.calls.append({**call, "function": function})
        elif event.channel == "reasoning":
            self.reasoning += event.text
        else:
            self.content += event.text

    def body(self) -> dict[str, Any]:
        """The whole; a reply that broke keeps what there was and says so in its choice."""
        end = self.end
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": None,
            "finish_reason": end.finish if end else "error",
            "native_finish_reason": end.native_finish if end else "error",
            "message": self._message(),
        }
        if self.error is not None:
            choice |= error_body(self.error)
        return {
            "id": self.heading.id,
            "object": "chat.completion",
            "created": self.heading.created,
            "model": self.heading.model,
            "provider": PROVIDER,
            "system_fingerprint": None,
            "service_tier": None,
            "choices": [choice],
            "usage": usage_object(end.usage if end else Usage()),
        }

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


def models_body(models: Sequence[Served]) -> dict[str, Any]:
    """GET /models."""
    documents = [model_document(served) for served in models]
    return {"data": documents, "total_count": len(documents), "links": {"next": None}}


def model_document(served: Served) -> dict[str, Any]:
    """One model as the catalogue describes it."""
    return {
        "id": served.slug,
        "canonical_slug": served.slug,
        "hugging_face_id": None,
        "name": served.name,
        "created": served.created,
        "description": f"{served.name}, served by this machine.",
        "context_length": served.context_tokens,
        "architecture": {
            "modality": "text->text",
            "input_modalities": ["text"],
            "output_modalities": ["text"],
            "tokenizer": "Qwen3",
            "instruct_type": "qwen3",
        },
        "pricing": {"prompt": "0", "completion": "0", "request": "0", "image": "0"},
        "top_provider": {
            "context_length": served.context_tokens,
            "max_completion_tokens": served.context_tokens,
            "is_moderated": False,
        },
        "per_request_limits": None,
        "supported_parameters": SUPPORTED_PARAMETERS,
        "default_parameters": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        "reasoning": {"mandatory": False, "default_enabled": True},
        "supported_voices": None,
        "knowledge_cutoff": None,
        "expiration_date": None,
        "links": {"details": f"/api/v1/models/{served.slug}/endpoints"},
    }
