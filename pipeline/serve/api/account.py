"""What a key's holder is told of the key and of what it has been used for."""

import contextlib
import datetime
from dataclasses import dataclass

from pipeline.errors import RequestError
from pipeline.serve import schema
from pipeline.serve.api.exchange import Exchange
from pipeline.serve.api.limits import Limits
from pipeline.serve.books.keys import Key
from pipeline.serve.books.ledger import Generation, Ledger
from pipeline.serve.content.log import ContentLog

NUM_DAYS = 30
"""So many of those that are over are told of."""
_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Account:
    """Handlers over ledger and content log; None keeps nothing."""

    ledger: Ledger | None
    limits: Limits
    content_log: ContentLog | None = None

    async def key(self, exchange: Exchange, key: Key | None) -> None:
        """GET /key."""
        await exchange.answer(schema.key_body(key, await self.limits.spent(key)), 200, {})

    async def credits(self, exchange: Exchange, key: Key | None) -> None:
        """GET /credits, of this key; who manages keys is told of all of them."""
        if key and key.is_management:
            spent = sum(s.ever for s in (await self.limits.spent_by_key()).values())
        else:
            spent = (await self.limits.spent(key)).ever
        await exchange.answer(schema.credits_body(spent), 200, {})

    async def generation(self, exchange: Exchange, key: Key | None) -> None:
        """GET /generation."""
        found = await self._find(exchange, key)
        await exchange.answer(schema.generation_body(found), 200, {})

    async def content(self, exchange: Exchange, key: Key | None) -> None:
        """GET /generation/content, of a key whose content is logged."""
        found = await self._find(exchange, key)
        line = await self.content_log.find(found) if self.content_log else None
        if line is None:
            raise RequestError(f"Content of generation {found.id} is not stored", 404, "not_found")
        await exchange.answer(schema.content_body(line), 200, {})

    async def activity(self, exchange: Exchange, key: Key | None) -> None:
        """GET /activity, of this key."""
        today = self.limits.today()
        first, last = today - NUM_DAYS * _DAY, today - _DAY
        if wanted := exchange.query.get("date"):
            first = last = _parse_day(wanted, first, last)
        key_id = key.id if key else None
        rows = await self.ledger.daily_use(key_id, first, last) if self.ledger else []
        await exchange.answer(schema.activity_body(rows), 200, {})

    async def _find(self, exchange: Exchange, key: Key | None) -> Generation:
        """The one that the query names; another key's is not there."""
        wanted = exchange.query.get("id")
        if wanted is None:
            raise RequestError("id: send the id of a generation, as its reply had it")
        found = await self.ledger.find(wanted) if self.ledger else None
        if found is None or found.key_id != (key.id if key else None):
            raise RequestError(f"Generation {wanted} not found", 404, "not_found")
        return found


def _parse_day(text: str, first: datetime.date, last: datetime.date) -> datetime.date:
    with contextlib.suppress(ValueError):
        day = datetime.date.fromisoformat(text)
        if first <= day <= last:
            return day
    raise RequestError(f"date: give one of the last {NUM_DAYS} days that are over, as YYYY-MM-DD")
