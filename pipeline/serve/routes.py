"""Which handler answers a request: by method and path, and the pages of browsers allowed in."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.types import Scope

from pipeline.errors import RequestError
from pipeline.serve.exchange import Exchange

PREFIXES = ("/api/v1", "/v1")
Handler = Callable[[Exchange], Awaitable[None]]
ModelHandler = Callable[[Exchange, str], Awaitable[None]]
"""Told the id of the model that the path names."""
# The public service's own, so that a page written for it works here.
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET,OPTIONS,PATCH,DELETE,POST,PUT",
    "Access-Control-Allow-Headers": (
        "Authorization, Content-Type, HTTP-Referer, X-Title, X-OpenRouter-Title, "
        "X-OpenRouter-Categories, X-OpenRouter-Metadata, X-Session-Id, X-Api-Key, *"
    ),
    "Access-Control-Max-Age": "86400",
}


@dataclass(frozen=True)
class Routes:
    """Each path begins with a slash, and may end with one more when it is asked for."""

    of_server: Mapping[str, tuple[str, Handler]]
    """Method and handler of paths that are asked for as they stand."""
    of_api: Mapping[str, tuple[str, Handler]]
    """The same after either of PREFIXES."""
    of_models: Mapping[str, ModelHandler]
    """GET only; in each path `{model}` stands for AUTHOR/SLUG."""

    def find(self, scope: Scope) -> Handler:
        """RequestError 404 for a path that nothing answers, 405 for another method than its own."""
        if scope["method"] == "OPTIONS":
            return allow
        path = scope["path"].rstrip("/")
        found = self.of_server.get(path) or self._find_of_api(path)
        if found is None:
            raise RequestError(f"{scope['path']} is not a route of this API", 404, "not_found")
        method, handler = found
        # What answers HEAD is GET's answer, whose body the HTTP server leaves out.
        if scope["method"] not in (method, "HEAD" if method == "GET" else method):
            raise RequestError(f"{scope['path']} takes {method}, not {scope['method']}", 405)
        return handler

    def _find_of_api(self, path: str) -> tuple[str, Handler] | None:
        for prefix in PREFIXES:
            if path.startswith(f"{prefix}/"):
                rest = path.removeprefix(prefix)
                return self.of_api.get(rest) or self._find_of_models(rest)
        return None

    def _find_of_models(self, path: str) -> tuple[str, Handler] | None:
        for form, handler in self.of_models.items():
            if match := re.fullmatch(form.replace("{model}", "([^/]+/[^/]+)"), path):
                return "GET", _about(match[1], handler)
        return None


def _about(model: str, handler: ModelHandler) -> Handler:
    async def answer(exchange: Exchange) -> None:
        await handler(exchange, model)

    return answer


async def allow(exchange: Exchange) -> None:
    """OPTIONS: what a browser asks before it asks."""
    await exchange.begin(204, "application/json", _PREFLIGHT)
    await exchange.write(b"", more=False)
