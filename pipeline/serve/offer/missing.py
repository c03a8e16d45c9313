"""What a model still lacks before a router would list it."""

from collections.abc import Iterator

from pipeline.serve.offer.catalog import AUTHOR, Served
from pipeline.serve.offer.provider import Listing
from pipeline.serve.schema.provider import QUANTIZATIONS


def what_is_missing(served: Served, listing: Listing) -> list[str]:
    """A sentence for each thing, the first of which a router cannot do without."""
    return [*_of_model(served), *_of_listing(listing)]


def _of_model(served: Served) -> Iterator[str]:
    if served.price.is_free and served.variant != "free":
        yield "it costs nothing and is not sold as free: give it a price, or the variant free"
    if served.author == AUTHOR:
        yield f"its id is {served.slug}: give it an author, as in acme/{served.name}"
    if served.hugging_face_id is None:
        yield "no Hugging Face id: by that a router knows which of its models this is"
    if served.quantization is None:
        yield "its quantization is not known: say bf16, fp8, int4, …"
    elif served.quantization not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        yield f"a router does not know the quantization {served.quantization}: say one of {known}"
    if not served.about:
        yield "no description"
    if "grammar" not in served.engine.capabilities:
        yield "its engine holds no reply to a form: no response_format, and no tool_choice"


def _of_listing(listing: Listing) -> Iterator[str]:
    if not listing.is_ready:
        yield "it is not said to be ready, so it stays hidden"
    if listing.country_code is None:
        yield "no country of its datacenter"
    if listing.openrouter_slug is None:
        yield "no slug of OpenRouter's that it belongs to"
    if listing.privacy_policy_url is None:
        yield "no address of a privacy policy"
    if listing.terms_of_service_url is None:
        yield "no address of terms of service"
    if listing.prompt_tokens_per_minute is None:
        yield "no capacity: how many tokens of prompts a minute it takes"
