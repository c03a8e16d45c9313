"""The catalogue on the wire: which models there are, and what each can do."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.engine.protocol import Capability
from pipeline.serve.catalog import Served
from pipeline.serve.reasoning import SHARES

# Only what is honoured, never what is merely accepted.
_ALWAYS_SUPPORTED = (
    "include_reasoning",
    "max_completion_tokens",
    "max_tokens",
    "parallel_tool_calls",
    "reasoning",
    "reasoning_effort",
    "stop",
    "temperature",
    "tools",
    "top_p",
)
_SUPPORTED_BY: dict[Capability, tuple[str, ...]] = {
    "frequency_penalty": ("frequency_penalty",),
    "grammar": ("response_format", "structured_outputs", "tool_choice"),
    "logit_bias": ("logit_bias",),
    "logprobs": ("logprobs", "top_logprobs"),
    "min_p": ("min_p",),
    "presence_penalty": ("presence_penalty",),
    "repetition_penalty": ("repetition_penalty",),
    "seed": ("seed",),
    "top_k": ("top_k",),
}
PRICING = {"prompt": "0", "completion": "0", "request": "0", "image": "0"}
"""USD a token: everything is free."""


def supported_parameters(able: frozenset[Capability]) -> list[str]:
    """What is honoured over an engine that can do this."""
    by_engine = [name for capability in able for name in _SUPPORTED_BY.get(capability, ())]
    return sorted([*_ALWAYS_SUPPORTED, *by_engine])


def models_body(
    documents: Sequence[Mapping[str, Any]], num_all: int, following: str | None
) -> dict[str, Any]:
    """GET /models: a page, how many models are on all of them, and where the next one is."""
    return {"data": documents, "total_count": num_all, "links": {"next": following}}


def count_body(num_models: int) -> dict[str, Any]:
    """GET /models/count."""
    return {"data": {"count": num_models}}


def model_body(served: Served) -> dict[str, Any]:
    """GET /model/AUTHOR/SLUG."""
    return {"data": model_document(served)}


def model_document(served: Served) -> dict[str, Any]:
    """One model as the catalogue describes it."""
    return {
        "id": served.slug,
        "canonical_slug": served.slug,
        "hugging_face_id": None,
        "name": served.name,
        "created": served.created,
        "description": description(served),
        "context_length": served.context_tokens,
        "architecture": architecture(),
        "pricing": PRICING,
        "top_provider": {
            "context_length": served.context_tokens,
            "max_completion_tokens": served.context_tokens,
            "is_moderated": False,
        },
        "per_request_limits": None,
        "supported_parameters": supported_parameters(served.engine.capabilities),
        "default_parameters": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        "reasoning": {
            "mandatory": False,
            "default_enabled": True,
            "supported_efforts": list(SHARES),
            "supports_max_tokens": True,
        },
        "supported_voices": None,
        "knowledge_cutoff": None,
        "expiration_date": None,
        "links": {"details": f"/api/v1/models/{served.slug}/endpoints"},
    }


def description(served: Served) -> str:
    """One sentence."""
    return f"{served.name}, served by this machine."


def architecture() -> dict[str, Any]:
    """Of every model here."""
    return {
        "modality": "text->text",
        "input_modalities": ["text"],
        "output_modalities": ["text"],
        "tokenizer": "Qwen3",
        "instruct_type": "qwen3",
    }
