"""One request from its arrival to its row in the ledger."""

import contextlib
import time
from collections.abc import AsyncGenerator, Mapping

from pipeline.errors import RequestError
from pipeline.serve.catalog import Served
from pipeline.serve.choices import Indexed, whole_usage
from pipeline.serve.events import Ended, Tally, Usage
from pipeline.serve.keys import Key
from pipeline.serve.ledger import Generation
from pipeline.serve.order import Order
from pipeline.serve.request import ChatRequest
from pipeline.serve.schema import generation_id

_MAX_LABEL = 256


class Record:
    """What was asked, and what has come of it so far."""

    def __init__(
        self,
        served: Served,
        request: ChatRequest,
        order: Order,
        key: Key | None,
        headers: Mapping[str, str],
        begun_s: float,
    ) -> None:
        """`begun_s` is when the request came, by the monotonic clock."""
        self.served = served
        self.request = request
        self.order = order
        self.created_s = time.time()
        self.id = generation_id(self.created)
        self.tallies = [Tally() for _ in range(order.num_choices)]
        self.error: RequestError | None = None
        self.is_booked = False
        self._key = key
        self._headers = headers
        self._begun_s = begun_s
        self._first_s: float | None = None
        self._ends: list[Ended] = []

    @property
    def created(self) -> int:
        """Unix seconds."""
        return int(self.created_s)

    @property
    def usage(self) -> Usage:
        """Of all choices, so far."""
        return whole_usage(self.tallies)

    async def noted(self, replies: AsyncGenerator[Indexed, None]) -> AsyncGenerator[Indexed, None]:
        """The same events; closing this closes them."""
        async with contextlib.aclosing(replies):
            async for index, event in replies:
                self._first_s = self._first_s or time.monotonic()
                if isinstance(event, Ended):
                    self._ends.append(event)
                yield index, event

    def generation(self) -> Generation:
        """The row, as things stand: a reply that neither ended nor failed was cancelled."""
        now_s, first_s, usage = time.monotonic(), self._first_s, self.usage
        end = self._ends[0] if len(self._ends) == self.order.num_choices else None
        failure = "error" if self.error else None
        return Generation(
            id=self.id,
            key_id=self._key.id if self._key else None,
            model=self.served.slug,
            artefact_hash=self.served.artefact_hash,
            engine=self.served.engine_name,
            created_ms=int(self.created_s * 1000),
            streamed=bool(self.request.stream),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            cached_tokens=usage.cached_tokens,
            finish_reason=end.finish if end else failure,
            native_finish_reason=end.native_finish if end else failure,
            latency_ms=_ms(now_s - self._begun_s),
            first_token_ms=None if first_s is None else _ms(first_s - self._begun_s),
            generation_ms=None if first_s is None else _ms(now_s - first_s),
            cancelled=end is None and self.error is None,
            error_type=self.error.error_type if self.error else None,
            ignored=self.order.ignored,
            http_referer=self._label("http-referer"),
            app_title=self._label("x-openrouter-title") or self._label("x-title"),
            external_user=self._said("user"),
            session_id=self._said("session_id") or self._label("x-session-id"),
        )

    def _label(self, header: str) -> str | None:
        text = self._headers.get(header)
        return text[:_MAX_LABEL] if text else None

    def _said(self, name: str) -> str | None:
        value = (self.request.model_extra or {}).get(name)
        return value[:_MAX_LABEL] if isinstance(value, str) else None


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
