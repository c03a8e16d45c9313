"""Which models a query asks for, in which order, and which page of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline.errors import RequestError

Document = Mapping[str, Any]
"""A model as the wire format has it."""
Sort = Literal[
    "most-popular",
    "newest",
    "top-weekly",
    "pricing-low-to-high",
    "pricing-high-to-low",
    "context-high-to-low",
    "throughput-high-to-low",
    "latency-low-to-high",
    "intelligence-high-to-low",
    "coding-high-to-low",
    "agentic-high-to-low",
    "design-arena-elo-high-to-low",
]
DEFAULT_LIMIT = 500
MAX_LIMIT = 1000
_PER_MILLION = 1e6


def _words(value: Any) -> Any:
    """Of a list with commas, in lower case."""
    if not isinstance(value, str):
        return value
    return tuple(word.strip().lower() for word in value.split(",") if word.strip())


_Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
_Price = Annotated[float, Field(allow_inf_nan=False)]


class ModelsQuery(BaseModel):
    """What is understood of the query of GET /models; other keys are ignored."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    offset: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1, le=MAX_LIMIT)
    sort: Sort | None = None
    q: str = ""
    supported_parameters: _Words = ()
    """All of them."""
    input_modalities: _Words = ()
    """Any of them, as of the next two; `all` is no bound."""
    output_modalities: _Words = ()
    model_authors: _Words = ()
    context: int = 0
    """At least so many tokens."""
    min_price: _Price | None = None
    """USD for a million tokens of the prompt."""
    max_price: _Price | None = None


@dataclass(frozen=True)
class Page:
    """Some of the models that were asked for."""

    documents: Sequence[Document]
    num_all: int
    """On every page together."""
    next: str | None
    """The query of the page after this one."""


def parse_query(query: Mapping[str, str]) -> ModelsQuery:
    """RequestError 400 names the first key whose value is wrong."""
    try:
        return ModelsQuery.model_validate(query)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise RequestError(f"{fault['loc'][0]}: {fault['msg']}") from error


def find_page(documents: Sequence[Document], query: Mapping[str, str]) -> Page:
    """Without offset and limit everything is on one page."""
    asked = parse_query(query)
    found = _sorted([document for document in documents if _fits(document, asked)], asked.sort)
    if asked.offset is None and asked.limit is None:
        return Page(found, len(found), None)
    begin, limit = asked.offset or 0, asked.limit or DEFAULT_LIMIT
    end = begin + limit
    after = urlencode({**query, "offset": end, "limit": limit}) if end < len(found) else None
    return Page(found[begin:end], len(found), after)


def _fits(document: Document, asked: ModelsQuery) -> bool:
    architecture = document["architecture"]
    named = f"{document['id']} {document['name']}".lower()
    low = -math.inf if asked.min_price is None else asked.min_price
    high = math.inf if asked.max_price is None else asked.max_price
    return (
        asked.q.strip().lower() in named
        and set(asked.supported_parameters) <= set(document["supported_parameters"])
        and _meets(asked.input_modalities, architecture["input_modalities"])
        and _meets(asked.output_modalities, architecture["output_modalities"])
        and _meets(asked.model_authors, [document["id"].partition("/")[0].lower()])
        and document["context_length"] >= asked.context
        and low <= float(document["pricing"]["prompt"]) * _PER_MILLION <= high
    )


def _meets(asked: Sequence[str], there: Sequence[str]) -> bool:
    return not asked or "all" in asked or not set(asked).isdisjoint(there)


def _sorted(documents: Sequence[Document], sort: Sort | None) -> Sequence[Document]:
    """By what is known of models here; by popularity, speed or marks they stay as they are."""
    keys: dict[str, Callable[[Document], float]] = {
        "newest": lambda document: -document["created"],
        "context-high-to-low": lambda document: -document["context_length"],
        "pricing-low-to-high": _price,
        "pricing-high-to-low": lambda document: -_price(document),
    }
    return sorted(documents, key=keys[sort]) if sort in keys else documents


def _price(document: Document) -> float:
    return float(document["pricing"]["prompt"]) + float(document["pricing"]["completion"])
