"""Keys over HTTP: made, told of, changed and deleted by the holder of a management key."""

import asyncio
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import RequestError
from pipeline.serve import schema
from pipeline.serve.api.exchange import Exchange
from pipeline.serve.api.limits import Limits
from pipeline.serve.asking.faults import first_fault
from pipeline.serve.asking.request import parse_object
from pipeline.serve.books.allowance import KeyChange, NewKey
from pipeline.serve.books.keys import Key, Keys, hash_key
from pipeline.serve.books.spending import Spent

PAGE = 100
Asked = TypeVar("Asked", bound=BaseModel)


class KeysQuery(BaseModel):
    """What is understood of the query of GET /keys; other names are ignored."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    offset: int = Field(default=0, ge=0, le=2**31)
    """So many keys are left out, the oldest ones."""
    limit: int = Field(default=PAGE, ge=1, le=PAGE)
    include_disabled: bool = False
    include_expired: bool = False


@dataclass(frozen=True)
class Managing:
    """Handlers over the keys in the books."""

    keys: Keys
    limits: Limits

    async def all(self, exchange: Exchange, _part: str) -> None:
        """GET /keys, oldest first."""
        asked = _check(KeysQuery, dict(exchange.query))
        now_s = self.limits.now_s()
        found = [
            key
            for key in await asyncio.to_thread(self.keys.all)
            if (asked.include_disabled or not key.disabled)
            and (asked.include_expired or not key.is_expired(now_s))
        ]
        page = found[asked.offset : asked.offset + asked.limit]
        spent = await self.limits.spent_by_key()
        told = [schema.managed_key(key, spent.get(key.id, Spent())) for key in page]
        await exchange.answer({"data": told}, 200, {})

    async def create(self, exchange: Exchange, _part: str) -> None:
        """POST /keys: the only time that a key's text is told."""
        asked = _check(NewKey, parse_object(await exchange.read_body()))
        columns = asked.columns
        text = await asyncio.to_thread(self.keys.create, columns.pop("name"), columns)
        key = _known(await asyncio.to_thread(self.keys.find, hash_key(text)))
        body = {"data": schema.managed_key(key, Spent()), "key": text}
        await exchange.answer(body, 201, {})

    async def one(self, exchange: Exchange, hashed: str) -> None:
        """GET /keys/HASH."""
        await self._tell(exchange, await asyncio.to_thread(self.keys.find, hashed))

    async def change(self, exchange: Exchange, hashed: str) -> None:
        """PATCH /keys/HASH."""
        asked = _check(KeyChange, parse_object(await exchange.read_body()))
        key = _known(await asyncio.to_thread(self.keys.find, hashed))
        await self._tell(exchange, await asyncio.to_thread(self.keys.change, key, asked.columns))

    async def delete(self, exchange: Exchange, hashed: str) -> None:
        """DELETE /keys/HASH."""
        key = _known(await asyncio.to_thread(self.keys.find, hashed))
        await asyncio.to_thread(self.keys.delete, key)
        await exchange.answer({"deleted": True}, 200, {})

    async def _tell(self, exchange: Exchange, found: Key | None) -> None:
        key = _known(found)
        body = {"data": schema.managed_key(key, await self.limits.spent(key))}
        await exchange.answer(body, 200, {})


def _known(key: Key | None) -> Key:
    if key is None:
        raise RequestError("API key not found", 404, "not_found")
    return key


def _check(model: type[Asked], values: dict[str, object]) -> Asked:
    """RequestError names the first field that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        place, what = first_fault(error, values)
        raise RequestError(f"{place}: {what}") from error
