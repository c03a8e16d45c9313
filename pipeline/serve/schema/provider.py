"""A model as a router's list has it: OpenRouter's provider schema 2.4, and the flat keys before it.

The schema takes no key that it does not know, and a document with one is dropped whole.
"""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pipeline.serve.asking.preferences import Quantization
from pipeline.serve.asking.reasoning import SHARES
from pipeline.serve.offer.catalog import Served
from pipeline.serve.offer.price import usd_text
from pipeline.serve.offer.provider import Listing
from pipeline.serve.schema.common import TOKENIZER
from pipeline.serve.schema.supported import supported_parameters

VERSION = "2.4"
QUANTIZATIONS = tuple(name for name in get_args(Quantization) if name != "unknown")
Body = dict[str, Any]
_BOOLEAN = {"type": "boolean"}
_PENALTY = {"type": "range", "min": -2, "max": 2}
_SHARE = {"type": "range", "min": 0, "max": 1}
_DESCRIPTORS: dict[str, Body] = {
    "frequency_penalty": _PENALTY,
    "logit_bias": {"type": "unknown"},
    "min_p": _SHARE,
    "presence_penalty": _PENALTY,
    "reasoning_effort": {"type": "enum", "values": [*SHARES, "none"]},
    "repetition_penalty": {"type": "range", "min": 0, "max": 2},
    "response_format": {"type": "enum", "values": ["text", "json_object", "json_schema"]},
    "seed": {"type": "integer", "min": 0, "max": 2**53 - 1},
    "stop": {"type": "array", "max_items": 4},
    "temperature": {"type": "range", "min": 0, "max": 2},
    "top_logprobs": {"type": "integer", "min": 0, "max": 20},
    "top_p": _SHARE,
}


def provider_models_body(models: Iterable[Served]) -> Body:
    """GET /provider/v1/models."""
    return {"data": [provider_document(served, served.listing) for served in models]}


def provider_document(served: Served, listing: Listing) -> Body:
    """One model by schema 2.4."""
    document = {
        "schema_version": VERSION,
        "id": served.slug,
        "name": served.shown_title,
        "hugging_face_id": served.hugging_face_id,
        "created": served.created,
        "tokenizer": TOKENIZER,
        "description": served.about or None,
        "input_modalities": [_text_in(served, listing)],
        "output_modalities": [_text_out(served, listing)],
        "pricing": _prices(served, "request", request=served.price.request),
        "capacity": _capacity("request", "request", listing.requests_per_minute),
        "openrouter": _openrouter(listing),
        "datacenters": _datacenters(listing, has_region=True),
        "deployment_region": listing.country_code,
        "passthrough_parameters": {
            "enable_thinking": {"type": "boolean"},
            "chat_template_kwargs": {
                "type": "object",
                "properties": {"enable_thinking": {"type": "boolean"}},
            },
        },
        # Retired on 2026-09-30: accepted, and read by nobody.
        "compliance": _said({"zdr": listing.zdr, "hipaa": listing.hipaa}),
        **_operation(served, listing),
    }
    return _said(document) | {"quantization": _quantization(served)}


def legacy_keys(served: Served, listing: Listing) -> Body:
    """The flat keys of the older format, which may stand beside those of GET /models."""
    supported = supported_parameters(served.engine.capabilities)
    features = [name for name, needed in _FEATURES.items() if needed in supported]
    document = {
        "object": "model",
        "owned_by": served.author,
        "input_modalities": ["text"],
        "output_modalities": ["text"],
        "max_output_length": served.max_completion_tokens,
        "capacity_tpm": listing.prompt_tokens_per_minute,
        "openrouter": _openrouter(listing),
        "datacenters": _datacenters(listing, has_region=False),
        **_operation(served, listing),
    }
    return _said(document) | {
        "quantization": _quantization(served),
        "supported_sampling_parameters": [name for name in _SAMPLING if name in supported],
        "supported_features": features,
    }


# The older format's words: all there are for sampling, and what each feature needs.
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "stop",
    "seed",
    "max_tokens",
    "logit_bias",
)
_FEATURES = {
    "tools": "tools",
    "json_mode": "response_format",
    "structured_outputs": "structured_outputs",
    "logprobs": "logprobs",
    "reasoning": "reasoning",
}


def _text_in(served: Served, listing: Listing) -> Body:
    price, longest = served.price, served.context_tokens
    modality = {
        "type": "text",
        "supported_inputs": {
            "max_context_length": _tokens(longest),
            "max_prompt_length": _tokens(longest - 1),  # the reply has a token at least
        },
        "pricing": _prices(served, "token", prompt=price.prompt, cached_prompt=price.cached),
        "capacity": _capacity("prompt", "token", listing.prompt_tokens_per_minute),
    }
    return _said(modality)


def _text_out(served: Served, listing: Listing) -> Body:
    price = served.price.completion
    capacity = _capacity("completion", "token", listing.completion_tokens_per_minute)
    if listing.concurrency is not None:
        capacity.append({"type": "concurrency", "unit": "request", "value": listing.concurrency})
    names = supported_parameters(served.engine.capabilities)
    modality = {
        "type": "text",
        "max_length": _tokens(served.max_completion_tokens),
        "streaming": True,
        "supported_parameters": {name: _descriptor(name, served) for name in names},
        "pricing": _prices(served, "token", completion=price, internal_reasoning=price),
        "capacity": capacity,
    }
    return _said(modality)


def _descriptor(name: str, served: Served) -> Body:
    """What a parameter takes; of most there is no more to say than that they are there."""
    if name in ("max_tokens", "max_completion_tokens"):
        longest = served.max_completion_tokens
        return {"type": "integer", "min": 1, "max": longest, "unit": "token"}
    if name == "top_k":
        return {"type": "integer", "min": 0, "max": served.chat.num_ids}
    return _DESCRIPTORS.get(name, _BOOLEAN)


def _prices(served: Served, unit: str, **picodollars: int | None) -> list[Body]:
    """What is billed: nothing of a free variant, and nothing that costs nothing.

    But a cached token may cost nothing where others do.
    """
    if served.variant == "free" or served.price.is_free:
        return []
    prices = []
    for name, cost in picodollars.items():
        if cost or (cost is not None and name == "cached_prompt"):
            price: Body = {"type": name, "unit": unit, "cost_usd": usd_text(cost)}
            prices.append(price | ({"implicit": True} if name == "cached_prompt" else {}))
    return prices


def _capacity(name: str, unit: str, value: int | None) -> list[Body]:
    if value is None:
        return []
    return [{"type": name, "unit": unit, "per": "minute", "value": value}]


def _operation(served: Served, listing: Listing) -> Body:
    return {
        "is_ready": listing.is_ready,
        "is_free": served.variant == "free",
        "discount_to_user": listing.discount,
        "deprecation_date": listing.deprecation_date,
    }


def _openrouter(listing: Listing) -> Body | None:
    return {"slug": listing.openrouter_slug} if listing.openrouter_slug else None


def _datacenters(listing: Listing, has_region: bool) -> list[Body]:
    if listing.country_code is None:
        return []
    region = listing.region if has_region else None
    return [_said({"country_code": listing.country_code, "region": region})]


def _quantization(served: Served) -> str | None:
    """In the schema's words; null is not known."""
    return served.quantization if served.quantization in QUANTIZATIONS else None


def _tokens(count: int) -> Body:
    return {"value": count, "unit": "token"}


def _said(document: Mapping[str, Any]) -> Body:
    """Without what was not said."""
    return {key: value for key, value in document.items() if value not in (None, [], {})}
