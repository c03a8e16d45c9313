"""HTTP in, HTTP out: which handler answers, whose request it is, and every failure in its shape."""

import contextlib
import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.types import Receive, Scope, Send

from pipeline.errors import RequestError
from pipeline.serve.api.account import Account
from pipeline.serve.api.exchange import Exchange, HungUp
from pipeline.serve.api.failures import as_request_error
from pipeline.serve.api.inference import Inference
from pipeline.serve.api.limits import Limits
from pipeline.serve.api.managing import Managing
from pipeline.serve.api.models import Models
from pipeline.serve.api.response_cache import ResponseCache
from pipeline.serve.api.routes import Handler, PartHandler, Routes
from pipeline.serve.books.keys import Key, Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.books.uses import OwnUses, Uses
from pipeline.serve.content.log import ContentLog
from pipeline.serve.monitoring.metrics import CONTENT_TYPE, Metrics, of_processes
from pipeline.serve.monitoring.pages import Pages
from pipeline.serve.monitoring.traces import Traces
from pipeline.serve.offer.catalog import Catalog
from pipeline.serve.openapi.description import Description
from pipeline.serve.routing.endpoints import Endpoints
from pipeline.serve.routing.measuring import Measuring
from pipeline.serve.schema.reply import USUAL, ChatStyle
from pipeline.serve.skins.chat import Chat
from pipeline.serve.skins.completions import Completions
from pipeline.serve.skins.messages import Messages
from pipeline.serve.skins.responses import Responses
from pipeline.serve.skins.skin import Skin

_ONLY_MANAGEMENT = "Only management keys can perform this operation"
_NOT_MANAGEMENT = "A management key manages keys and asks for no reply; send an ordinary key"
KEEP_ALIVE_S = 3.0
"""Some official clients give up after five seconds in which nothing came."""
KeyHandler = Callable[[Exchange, Key | None], Awaitable[None]]
"""Told whose request it is; None where the server wants no key."""


@dataclass(frozen=True)
class App:
    """The ASGI application over the models of a catalog."""

    catalog: Catalog
    keys: Keys | None = None
    """None lets everybody in."""
    ledger: Ledger | None = None
    keep_alive_s: float = KEEP_ALIVE_S
    now_s: Callable[[], float] = time.time
    """Since the epoch: by it limits begin anew."""
    uses: Uses | None = None
    """What keys use of their limits; None counts it in this process."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served here")
        exchange = Exchange(scope, receive, send)
        with contextlib.suppress(HungUp):
            try:
                await self._routes.find(scope)(exchange)
            except HungUp:
                raise
            except Exception as error:  # noqa: BLE001 - the last resort: an answer to anything
                failure = as_request_error(error)
                if not exchange.is_started:
                    wait_s = failure.retry_after_s
                    headers = {} if wait_s is None else {"Retry-After": str(wait_s)}
                    headers |= failure.headers
                    asked, metadata = exchange.asked_models, exchange.metadata
                    body = exchange.skin.error_body(failure, asked, metadata)
                    await exchange.answer(body, failure.status, headers)

    style: ChatStyle = USUAL
    cache: ResponseCache = field(default_factory=ResponseCache)
    content_log: ContentLog | None = None
    """None keeps no word, whatever a key says."""
    metrics: Metrics = field(default_factory=Metrics)
    traces: Traces | None = None
    pages: Pages | None = None
    """Of the other processes of this server; None is that there are none."""

    @functools.cached_property
    def endpoints_of(self) -> Endpoints:
        """Where a model may be asked."""
        return Endpoints(Measuring(self.ledger, self.now_s))

    async def close(self) -> None:
        """Let go of connections to servers elsewhere; the engines are their owner's."""
        await self.endpoints_of.close()

    @functools.cached_property
    def _routes(self) -> Routes:
        models = Models(self.catalog, self.endpoints_of, self._is_known)
        account = Account(self.ledger, self._limits, self.content_log)
        description = Description(lambda: self._routes)
        of_server: dict[str, tuple[str, Handler]] = {
            "/health": ("GET", self._health),
            "/ready": ("GET", self._ready),
            "/metrics": ("GET", self._metrics),
            "/openapi.json": ("GET", description.document),
            "/docs": ("GET", description.page),
            "/provider/v1/models": ("GET", models.for_routers),
        }
        of_api: dict[str, tuple[str, Handler]] = {
            "/chat/completions": ("POST", self._infer(Chat(self.style))),
            "/completions": ("POST", self._infer(Completions())),
            "/responses": ("POST", self._infer(Responses())),
            "/messages": ("POST", self._infer(Messages())),
            "/embeddings": ("POST", self._for_key(models.embed)),
            "/models": ("GET", models.all),
            "/models/count": ("GET", models.count),
            "/models/user": ("GET", self._for_key(models.of_key)),
            "/endpoints/zdr": ("GET", models.all_endpoints),
            "/providers": ("GET", models.providers),
            "/key": ("GET", self._for_key(account.key)),
            "/auth/key": ("GET", self._for_key(account.key)),
            "/credits": ("GET", self._for_key(account.credits)),
            "/generation": ("GET", self._for_key(account.generation)),
            "/generation/content": ("GET", self._for_key(account.content)),
            "/activity": ("GET", self._for_key(account.activity)),
        }
        of_models = {
            "/model/{model}": models.one,
            "/models/{model}/endpoints": models.endpoints,
        }
        return Routes(of_server, of_api, of_models, self._of_keys())

    @functools.cached_property
    def _limits(self) -> Limits:
        return Limits(self.ledger, self.now_s, self.uses or OwnUses(self.ledger))

    def _of_keys(self) -> dict[str, dict[str, PartHandler]]:
        return {
            "/keys": {"GET": self._managed(Managing.all), "POST": self._managed(Managing.create)},
            "/keys/{hash}": {
                "GET": self._managed(Managing.one),
                "PATCH": self._managed(Managing.change),
                "DELETE": self._managed(Managing.delete),
            },
        }

    def _managed(self, work: Callable[[Managing, Exchange, str], Awaitable[None]]) -> PartHandler:
        async def answer(exchange: Exchange, part: str) -> None:
            key = await self._admit(exchange)
            if self.keys is None or key is None or not key.is_management:
                raise RequestError(_ONLY_MANAGEMENT, 403, "permission_denied")
            await work(Managing(self.keys, self._limits), exchange, part)

        return answer

    def _infer(self, skin: Skin) -> Handler:
        inference = Inference(
            self.catalog,
            self.endpoints_of,
            self.ledger,
            self._limits,
            self.cache,
            self.keep_alive_s,
            self.metrics,
            self.content_log,
        )

        async def answer(exchange: Exchange) -> None:
            exchange.skin, key = skin, None
            try:
                key = await self._admit(exchange)
                if key is not None and key.is_management:
                    raise RequestError(_NOT_MANAGEMENT, 403, "permission_denied")
                await inference.answer(exchange, key, skin)
            except HungUp:
                raise
            except Exception as error:
                failure = as_request_error(error)
                if not exchange.is_counted:
                    self.metrics.refused(failure.status, key)
                raise failure from error

        return self._traced(answer)

    def _traced(self, handler: Handler) -> Handler:
        traces = self.traces
        if traces is None:
            return handler

        async def answer(exchange: Exchange) -> None:
            path = exchange.scope["path"].rstrip("/")
            with traces.request(path, exchange.headers) as exchange.trace:
                await handler(exchange)

        return answer

    def _for_key(self, handler: KeyHandler) -> Handler:
        async def answer(exchange: Exchange) -> None:
            await handler(exchange, await self._admit(exchange))

        return answer

    async def _health(self, exchange: Exchange) -> None:
        """Whether this process answers; `_ready` says whether it answers requests."""
        await exchange.answer({"status": "ok"}, 200, {})

    async def _ready(self, exchange: Exchange) -> None:
        """Whether every engine answers, and what they say can be booked."""
        is_ready = self.ledger is None or self.ledger.state.is_ready
        is_ready = is_ready and await self.catalog.is_ready()
        status = "ready" if is_ready else "not ready"
        await exchange.answer({"status": status}, 200 if is_ready else 503, {})

    async def _metrics(self, exchange: Exchange) -> None:
        """To this machine as it is; to others, and through a proxy, for a key."""
        if not exchange.is_local:
            await self._admit(exchange)
        page = await self.metrics.page(self.catalog, self.ledger)
        if self.pages:
            page = of_processes({self.pages.process: page.decode(), **self.pages.others})
        await exchange.begin(200, CONTENT_TYPE, {"content-length": str(len(page))})
        await exchange.write(page, more=False)

    async def _is_known(self, exchange: Exchange) -> bool:
        """Whether a request that needs no key has come with one, if there are keys."""
        with contextlib.suppress(RequestError):
            await self._admit(exchange)
            return True
        return False

    async def _admit(self, exchange: Exchange) -> Key | None:
        """Whose request it is; RequestError 401 for one that must not be answered."""
        if self.keys is None:
            return None
        headers = exchange.headers
        return await self.keys.check(headers.get("authorization"), headers.get("x-api-key"))
