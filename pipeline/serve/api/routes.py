"""Which handler answers a request: by method and path, and the pages of browsers allowed in."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.types import Scope

from pipeline.errors import RequestError
from pipeline.serve.api.exchange import Exchange

PREFIXES = ("/api/v1", "/v1")
Handler = Callable[[Exchange], Awaitable[None]]
PartHandler = Callable[[Exchange, str], Awaitable[None]]
"""Told the part of the path that names something."""
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
    of_models: Mapping[str, PartHandler]
    """GET only; in each path `{model}` stands for AUTHOR/SLUG."""
    of_keys: Mapping[str, Mapping[str, PartHandler]]
    """By method; in a path `{hash}` stands for a key's, of one without it the part is empty."""

    def find(self, scope: Scope) -> Handler:
        """RequestError 404 for a path that nothing answers, 405 for another method than its own."""
        if scope["method"] == "OPTIONS":
            return allow
        path = scope["path"].rstrip("/")
        found = self._find_of_server(path) or self._find_of_api(path)
        if found is None:
            raise RequestError(f"{scope['path']} is not a route of this API", 404, "not_found")
        # What answers HEAD is GET's answer, whose body the HTTP server leaves out.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in found:
            methods = " or ".join(found)
            raise RequestError(f"{scope['path']} takes {methods}, not {scope['method']}", 405)
        return found[method]

    def _find_of_server(self, path: str) -> Mapping[str, Handler] | None:
        return dict([self.of_server[path]]) if path in self.of_server else None

    def _find_of_api(self, path: str) -> Mapping[str, Handler] | None:
        for prefix in PREFIXES:
            if path.startswith(f"{prefix}/"):
                rest = path.removeprefix(prefix)
                if rest in self.of_api:
                    return dict([self.of_api[rest]])
                return self._find_of_part(rest)
        return None

    def _find_of_part(self, path: str) -> Mapping[str, Handler] | None:
        of_models = {form: {"GET": handler} for form, handler in self.of_models.items()}
        for form, handlers in {**of_models, **self.of_keys}.items():
            pattern = form.replace("{model}", "([^/]+/[^/]+)").replace("{hash}", "([^/]+)")
            if match := re.fullmatch(pattern, path):
                part = match[1] if match.re.groups else ""
                return {method: _about(part, handler) for method, handler in handlers.items()}
        return None


def _about(part: str, handler: PartHandler) -> Handler:
    async def answer(exchange: Exchange) -> None:
        await handler(exchange, part)

    return answer


async def allow(exchange: Exchange) -> None:
    """OPTIONS: what a browser asks before it asks."""
    await exchange.begin(204, "application/json", _PREFLIGHT)
    await exchange.write(b"", more=False)
