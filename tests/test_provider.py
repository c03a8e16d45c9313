"""What a router is told of a model, in both formats, and what it would still miss."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.engine.protocol import Capability
from pipeline.serve.offer.catalog import Served
from pipeline.serve.offer.missing import what_is_missing
from pipeline.serve.offer.price import Price, parse_usd
from pipeline.serve.offer.provider import UNLISTED, Listing
from pipeline.serve.probes.document import find_fault
from pipeline.serve.schema.models import model_document
from pipeline.serve.schema.provider import (
    legacy_keys,
    provider_document,
    provider_models_body,
)
from pipeline.serve.schema.supported import supported_parameters

SCHEMA = json.loads((Path(__file__).parent / "provider_schema.json").read_text("utf-8"))
PRICE = Price(
    prompt=parse_usd("0.00000005"),
    completion=parse_usd("0.0000004"),
    cached=parse_usd("0.000000025"),
    request=parse_usd("0.001"),
)
LISTING = Listing(
    openrouter_slug="qwen/qwen3-8b",
    country_code="DE",
    region="fsn1",
    deprecation_date="2027-06-01T15:00:00Z",
    discount=0.2,
    prompt_tokens_per_minute=1_000_000,
    completion_tokens_per_minute=200_000,
    requests_per_minute=600,
    concurrency=64,
    privacy_policy_url="https://acme.example/privacy",
    terms_of_service_url="https://acme.example/terms",
)
BARE: dict[str, Any] = {
    "price": Price(),
    "quantization": None,
    "hugging_face_id": None,
    "about": "",
    "author": "local",
}


@pytest.fixture
def served(chat: Chat) -> Served:
    engine = ScriptedEngine(able=get_args(Capability))
    return Served(
        "qwen3-ft",
        chat,
        engine,
        1767225600,
        author="acme",
        title="Acme: Qwen3 FT",
        about="Answers about bicycles.",
        price=PRICE,
        quantization="bf16",
        max_tokens=800,
        hugging_face_id="acme/Qwen3-FT",
        listing=LISTING,
    )


def check(*documents: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate({"data": list(documents)})
    assert [find_fault(document) for document in documents] == [None] * len(documents)


def test_a_document_with_everything_is_by_the_schema(served: Served) -> None:
    document = provider_document(served, LISTING)

    check(document)
    assert document["id"] == "acme/qwen3-ft"
    assert document["quantization"] == "bf16"
    assert document["datacenters"] == [{"country_code": "DE", "region": "fsn1"}]
    assert document["deployment_region"] == "DE"
    assert document["capacity"] == [
        {"type": "request", "unit": "request", "per": "minute", "value": 600}
    ]
    into, out = document["input_modalities"][0], document["output_modalities"][0]
    assert into["supported_inputs"] == {
        "max_context_length": {"value": 1000, "unit": "token"},
        "max_prompt_length": {"value": 999, "unit": "token"},
    }
    assert out["max_length"] == {"value": 800, "unit": "token"}
    assert out["supported_parameters"]["max_tokens"]["max"] == 800
    assert out["capacity"][1] == {"type": "concurrency", "unit": "request", "value": 64}


def test_of_what_nobody_said_a_document_says_nothing(chat: Chat) -> None:
    bare = Served("tiny", chat, ScriptedEngine(), 0)
    document = provider_document(bare, UNLISTED)

    check(document)
    assert set(document) == {
        "schema_version",
        "id",
        "name",
        "created",
        "tokenizer",
        "input_modalities",
        "output_modalities",
        "passthrough_parameters",
        "quantization",
        "is_ready",
        "is_free",
        "discount_to_user",
    }
    assert "pricing" not in document["input_modalities"][0]


def test_prices_are_decimal_and_only_of_what_costs_something(served: Served) -> None:
    document = provider_document(served, LISTING)
    prices = {
        price["type"]: price["cost_usd"]
        for scope in (document, *document["input_modalities"], *document["output_modalities"])
        for price in scope["pricing"]
    }

    assert prices == {
        "request": "0.001",
        "prompt": "0.00000005",
        "cached_prompt": "0.000000025",
        "completion": "0.0000004",
        "internal_reasoning": "0.0000004",
    }
    plain = provider_document(replace(served, price=Price(prompt=5)), LISTING)
    assert [price["type"] for price in plain["input_modalities"][0]["pricing"]] == ["prompt"]
    assert "pricing" not in plain
    assert "pricing" not in plain["output_modalities"][0]


def test_what_is_free_has_no_prices(served: Served) -> None:
    document = provider_document(replace(served, variant="free"), LISTING)

    check(document)
    assert document["is_free"] is True
    assert document["id"] == "acme/qwen3-ft:free"
    assert "cost_usd" not in json.dumps(document)


@pytest.mark.parametrize("able", [(), ("grammar",), ("seed", "logprobs"), get_args(Capability)])
def test_no_parameter_is_declared_that_the_engine_does_not_honour(
    served: Served, able: tuple[Capability, ...]
) -> None:
    limited = replace(served, engine=ScriptedEngine(able=able))
    document = provider_document(limited, LISTING)

    check(document)
    declared = document["output_modalities"][0]["supported_parameters"]
    assert sorted(declared) == supported_parameters(frozenset(able))
    assert ("seed" in declared) == ("seed" in able)
    assert ("tool_choice" in declared) == ("grammar" in able)


def test_a_quantization_that_no_router_knows_is_not_told(served: Served) -> None:
    document = provider_document(replace(served, quantization="q4_k_m"), LISTING)

    check(document)
    assert document["quantization"] is None


def test_what_was_retired_is_told_if_it_was_said(served: Served) -> None:
    listing = replace(LISTING, zdr=True, hipaa=False)
    document = provider_document(served, listing)

    assert document.pop("compliance") == {"zdr": True, "hipaa": False}
    assert document == provider_document(served, LISTING)


def test_the_body_has_every_model_by_its_own_listing(served: Served) -> None:
    other = replace(served, name="other", listing=replace(LISTING, is_ready=False))
    body = provider_models_body([served, other])

    check(*body["data"])
    assert [model["is_ready"] for model in body["data"]] == [True, False]


def test_the_older_keys_stand_beside_those_of_the_catalogue(served: Served) -> None:
    document, keys = model_document(served), legacy_keys(served, LISTING)

    assert document | keys == document
    assert keys == {
        "object": "model",
        "owned_by": "acme",
        "input_modalities": ["text"],
        "output_modalities": ["text"],
        "quantization": "bf16",
        "max_output_length": 800,
        "supported_sampling_parameters": [
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
        ],
        "supported_features": ["tools", "json_mode", "structured_outputs", "logprobs", "reasoning"],
        "is_ready": True,
        "is_free": False,
        "discount_to_user": 0.2,
        "capacity_tpm": 1_000_000,
        "deprecation_date": "2027-06-01T15:00:00Z",
        "openrouter": {"slug": "qwen/qwen3-8b"},
        "datacenters": [{"country_code": "DE"}],
    }


def test_the_older_keys_name_no_feature_that_is_not_there(served: Served) -> None:
    keys = legacy_keys(replace(served, engine=ScriptedEngine()), LISTING)

    assert keys["supported_features"] == ["tools", "reasoning"]
    assert keys["supported_sampling_parameters"] == ["temperature", "top_p", "stop", "max_tokens"]


def test_nothing_is_missing_of_a_model_of_which_all_is_said(served: Served) -> None:
    assert what_is_missing(served, LISTING) == []
    assert what_is_missing(replace(served, price=Price(), variant="free"), LISTING) == []


@pytest.mark.parametrize(
    ("of_model", "of_listing", "sentence"),
    [
        ({"price": Price()}, {}, "costs nothing and is not sold as free"),
        ({"author": "local"}, {}, "local/qwen3-ft: give it an author"),
        ({"hugging_face_id": None}, {}, "no Hugging Face id"),
        ({"quantization": None}, {}, "quantization is not known"),
        ({"quantization": "q4_k_m"}, {}, "does not know the quantization q4_k_m"),
        ({"about": ""}, {}, "no description"),
        ({"engine": ScriptedEngine()}, {}, "no tool_choice"),
        ({}, {"is_ready": False}, "stays hidden"),
        ({}, {"country_code": None}, "no country"),
        ({}, {"openrouter_slug": None}, "no slug"),
        ({}, {"privacy_policy_url": None}, "privacy policy"),
        ({}, {"terms_of_service_url": None}, "terms of service"),
        ({}, {"prompt_tokens_per_minute": None}, "no capacity"),
    ],
)
def test_each_thing_that_is_missing_is_one_sentence(
    served: Served, of_model: dict[str, Any], of_listing: dict[str, Any], sentence: str
) -> None:
    missing = what_is_missing(replace(served, **of_model), replace(LISTING, **of_listing))

    assert len(missing) == 1
    assert sentence in missing[0]


def test_everything_that_is_missing_is_told_at_once(served: Served) -> None:
    assert len(what_is_missing(replace(served, **BARE), UNLISTED)) == 10
