"""What is told of the models: which there are, where they are served, and that none embeds."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import Availability, RequestError
from pipeline.serve import schema
from pipeline.serve.api.exchange import Exchange
from pipeline.serve.api.listing import find_page
from pipeline.serve.asking.request import parse_object
from pipeline.serve.books.keys import Key
from pipeline.serve.offer.catalog import Catalog, Served
from pipeline.serve.routing.endpoints import Endpoints
from pipeline.serve.schema.endpoints import (
    Seen,
    all_endpoints_body,
    endpoints_body,
    providers_body,
)


@dataclass(frozen=True)
class Models:
    """Handlers over one catalog; they answer while the server is about to stop, too."""

    catalog: Catalog
    endpoints_of: Endpoints
    is_known: Callable[[Exchange], Awaitable[bool]]
    """Whether it is told how fast others were answered."""

    async def all(self, exchange: Exchange) -> None:
        """GET /models."""
        await self.of_key(exchange, None)

    async def of_key(self, exchange: Exchange, key: Key | None) -> None:
        """GET /models/user: those that the key may ask."""
        page = find_page(self._documents(key), exchange.query)
        following = f"{exchange.scope['path']}?{page.next}" if page.next else None
        await exchange.answer(schema.models_body(page.documents, page.num_all, following), 200, {})

    async def count(self, exchange: Exchange) -> None:
        """GET /models/count, filtered as the list is."""
        page = find_page(self._documents(), exchange.query)
        await exchange.answer(schema.count_body(page.num_all), 200, {})

    async def one(self, exchange: Exchange, model: str) -> None:
        """GET /model/AUTHOR/SLUG."""
        await exchange.answer(schema.model_body(self._find(exchange, model)), 200, {})

    async def endpoints(self, exchange: Exchange, model: str) -> None:
        """GET /models/AUTHOR/SLUG/endpoints."""
        served = self._find(exchange, model)
        seen = await self._seen(exchange, [served])
        await exchange.answer(endpoints_body(served, seen), 200, {})

    async def all_endpoints(self, exchange: Exchange) -> None:
        """GET /endpoints/zdr."""
        seen = await self._seen(exchange, self.catalog.models)
        await exchange.answer(all_endpoints_body(seen), 200, {})

    async def providers(self, exchange: Exchange) -> None:
        """GET /providers."""
        every = [e for served in self.catalog.models for e in self.endpoints_of(served)]
        slugs = {endpoint.tag.partition("/")[0]: endpoint.provider for endpoint in every}
        body = providers_body([(name, slug) for slug, name in slugs.items()])
        await exchange.answer(body, 200, {})

    async def for_routers(self, exchange: Exchange) -> None:
        """GET /provider/v1/models: by the schema of those who list what others serve."""
        await exchange.answer(schema.provider_models_body(self.catalog.models), 200, {})

    async def embed(self, exchange: Exchange, _key: Key | None) -> None:
        """POST /embeddings: refused, whichever model is asked."""
        model = parse_object(await exchange.read_body()).get("model")
        if not isinstance(model, str | None):
            raise RequestError("model: give a string")
        exchange.asked_models = (model,) if model else ()
        slug = self.catalog.find(model).slug
        detail = f"{slug} answers /chat/completions"
        raise RequestError(
            f"{slug} does not embed; ask it at /chat/completions",
            availability=Availability("wrong_endpoint", constraint=("model", detail)),
        )

    async def _seen(self, exchange: Exchange, models: Sequence[Served]) -> list[Seen]:
        """Their endpoints, asked for their health at the same time."""
        endpoints = [endpoint for served in models for endpoint in self.endpoints_of(served)]
        measuring = self.endpoints_of.measure(endpoints)
        healths = asyncio.gather(*(endpoint.is_healthy() for endpoint in endpoints))
        _, healthy, shows_speed = await asyncio.gather(measuring, healths, self.is_known(exchange))
        return [
            Seen(endpoint, is_healthy, shows_speed)
            for endpoint, is_healthy in zip(endpoints, healthy, strict=True)
        ]

    def _documents(self, key: Key | None = None) -> list[Mapping[str, Any]]:
        models = [m for m in self.catalog.models if key is None or key.may_ask(m.slug)]
        return [schema.model_document(served) for served in models]

    def _find(self, exchange: Exchange, model: str) -> Served:
        """What a path names and is not there is a 404, whatever is wrong with the id."""
        exchange.asked_models = (model,)
        try:
            return self.catalog.resolve(model)
        except RequestError as error:
            availability = error.availability
            raise RequestError(str(error), 404, "not_found", availability=availability) from error
