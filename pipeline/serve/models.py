"""What is told of the models: which there are, where they are served, and that none embeds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import Availability, RequestError
from pipeline.serve import schema
from pipeline.serve.catalog import Catalog, Served
from pipeline.serve.exchange import Exchange
from pipeline.serve.keys import Key
from pipeline.serve.listing import find_page
from pipeline.serve.request import parse_object


@dataclass(frozen=True)
class Models:
    """Handlers over one catalog; they answer while the server is about to stop, too."""

    catalog: Catalog

    async def all(self, exchange: Exchange) -> None:
        """GET /models."""
        page = find_page(self._documents(), exchange.query)
        following = f"{exchange.scope['path']}?{page.next}" if page.next else None
        await exchange.answer(schema.models_body(page.documents, page.num_all, following), 200, {})

    async def of_key(self, exchange: Exchange, _key: Key | None) -> None:
        """GET /models/user: every key may ask every model."""
        await self.all(exchange)

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
        is_healthy = await served.engine.is_healthy()
        await exchange.answer(schema.endpoints_body(served, is_healthy), 200, {})

    async def all_endpoints(self, exchange: Exchange) -> None:
        """GET /endpoints/zdr."""
        models = [(served, await served.engine.is_healthy()) for served in self.catalog.models]
        await exchange.answer(schema.all_endpoints_body(models), 200, {})

    async def providers(self, exchange: Exchange) -> None:
        """GET /providers."""
        await exchange.answer(schema.providers_body(), 200, {})

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

    def _documents(self) -> list[Mapping[str, Any]]:
        return [schema.model_document(served) for served in self.catalog.models]

    def _find(self, exchange: Exchange, model: str) -> Served:
        """What a path names and is not there is a 404, whatever is wrong with the id."""
        exchange.asked_models = (model,)
        try:
            return self.catalog.resolve(model)
        except RequestError as error:
            availability = error.availability
            raise RequestError(str(error), 404, "not_found", availability=availability) from error
