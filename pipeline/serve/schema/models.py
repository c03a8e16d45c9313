"""The catalogue on the wire: which models there are, and what each can do."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.serve.asking.reasoning import SHARES
from pipeline.serve.offer.catalog import Served
from pipeline.serve.offer.price import Price, usd_text
from pipeline.serve.schema.common import TOKENIZER
from pipeline.serve.schema.provider import legacy_keys
from pipeline.serve.schema.supported import supported_parameters


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
        "hugging_face_id": served.hugging_face_id,
        "name": served.shown_title,
        "created": served.created,
        "description": description(served),
        "context_length": served.context_tokens,
        "architecture": architecture(),
        "pricing": pricing(served.price),
        "top_provider": {
            "context_length": served.context_tokens,
            "max_completion_tokens": served.max_completion_tokens,
            "is_moderated": False,
        },
        "per_request_limits": None,
        "supported_parameters": supported_parameters(served.engine.capabilities),
        "default_parameters": {
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "frequency_penalty": None,
            "presence_penalty": None,
            "repetition_penalty": None,
        },
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
        **legacy_keys(served, served.listing),
    }


def description(served: Served) -> str:
    """A sentence at least."""
    return served.about or f"{served.shown_title}, served by this machine."


def pricing(price: Price) -> dict[str, str]:
    """USD a token, or a request; what is not sold is left out."""
    prices = {"prompt": price.prompt, "completion": price.completion, "request": price.request}
    if price.cached is not None:
        prices["input_cache_read"] = price.cached
    return {name: usd_text(amount) for name, amount in prices.items()} | {"image": "0"}


def architecture() -> dict[str, Any]:
    """Of every model here."""
    return {
        "modality": "text->text",
        "input_modalities": ["text"],
        "output_modalities": ["text"],
        "tokenizer": TOKENIZER,
        "instruct_type": "qwen3",
    }
