"""What the API says of itself: as a document for programs, and as a page for people."""

import asyncio
import functools
from collections.abc import Callable

from pipeline.serve.api.exchange import Exchange
from pipeline.serve.api.routes import Routes
from pipeline.serve.openapi.components import Schema
from pipeline.serve.openapi.document import openapi_document
from pipeline.serve.openapi.page import render_page


class Description:
    """Handlers over the routes, which are its own, too; made once, when first asked for."""

    def __init__(self, find_routes: Callable[[], Routes]) -> None:
        self._find_routes = find_routes

    async def document(self, exchange: Exchange) -> None:
        """GET /openapi.json."""
        document, _ = await asyncio.to_thread(lambda: self._made)
        await exchange.answer(document, 200, {})

    async def page(self, exchange: Exchange) -> None:
        """GET /docs."""
        _, page = await asyncio.to_thread(lambda: self._made)
        length = {"content-length": str(len(page))}
        await exchange.begin(200, "text/html; charset=utf-8", length)
        await exchange.write(page, more=False)

    @functools.cached_property
    def _made(self) -> tuple[Schema, bytes]:
        document = openapi_document(self._find_routes())
        return document, render_page(document).encode()
