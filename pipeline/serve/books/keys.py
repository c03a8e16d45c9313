"""Keys: whoever sends one may use the server; the books hold only what tells a right one."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, RowMapping, exists, insert, literal, select, update

from pipeline.errors import BooksError, RequestError
from pipeline.serve.books import tables
from pipeline.serve.books.allowance import Priority, Reset

PREFIX = "sk-or-v1-"
CACHE_S = 5.0
"""How long a key that was changed may still be taken for what it was."""
_MIN_DIGITS = 4
"""Of a hash, to be taken for one."""
_COLUMNS = [column for column in tables.keys.c if column.name != "deleted_ms"]
_IS_THERE = tables.keys.c.deleted_ms.is_(None)


@dataclass(frozen=True)
class Key:
    """What is known of a key; its text is not."""

    id: int
    hash: str
    """SHA-256 of the text, in hex."""
    label: str
    """Enough of the text to tell it from others: sk-or-v1-abc...123."""
    name: str
    created_ms: int
    """Since the epoch."""
    disabled: bool
    limit_picodollars: int | None = None
    """None is no limit, as of the next ones."""
    limit_reset: Reset | None = None
    """None counts all that was ever spent."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and replies together."""
    streams: int | None = None
    """Requests at the same time."""
    priority: Priority | None = None
    """None is normal."""
    models: tuple[str, ...] | None = None
    """The only ones that it may ask."""
    expires_ms: int | None = None
    is_management: bool = False
    """Whether it manages keys, and asks for no reply."""
    updated_ms: int | None = None
    log_content: bool = False
    """Whether what it asks and is answered is kept, word by word."""

    @property
    def is_limited(self) -> bool:
        """Whether what it uses has to be counted before a reply is in the books."""
        most = (self.requests_per_minute, self.tokens_per_minute, self.streams)
        return any(limit is not None for limit in (self.limit_picodollars, *most))

    def is_usable(self, now_s: float) -> bool:
        """Whether it opens anything."""
        return not self.disabled and not self.is_expired(now_s)

    def is_expired(self, now_s: float) -> bool:
        """Whether its time is over."""
        return self.expires_ms is not None and self.expires_ms <= now_s * 1000

    def may_ask(self, slug: str) -> bool:
        """A model that it may ask, it may ask under every variant."""
        if self.models is None:
            return True
        named = {model.lower() for model in self.models}
        return not named.isdisjoint({slug.lower(), slug.lower().partition(":")[0]})


class Keys:
    """The keys in the books; what was deleted is not there."""

    def __init__(
        self, books: Engine, cache_s: float = CACHE_S, now_s: Callable[[], float] = time.time
    ):
        self._books = books
        self._cache_s = cache_s
        self._now_s = now_s
        self._fresh: dict[str, tuple[float, Key]] = {}

    def create(
        self,
        name: str,
        columns: Mapping[str, Any] | None = None,
        *,
        is_management: bool = False,
    ) -> str:
        """Make a key and return its text, which nobody can ask for again.

        The columns are those of a KeyChange.
        """
        if not name.strip():
            raise BooksError("a key needs a name that says whose it is")
        key, row = self._new(name)
        row |= {**(columns or {}), "is_management": is_management}
        with self._books.begin() as connection:
            connection.execute(insert(tables.keys).values(row))
        return key

    def create_first(self, name: str) -> str | None:
        """The same if there is no key at all, else None; of several processes one makes it."""
        key, row = self._new(name)
        columns = [tables.keys.c[column] for column in row]
        values = [
            literal(value, column.type) for column, value in zip(columns, row.values(), strict=True)
        ]
        none_yet = select(*values).where(~exists(select(tables.keys.c.id).where(_IS_THERE)))
        with self._books.begin() as connection:
            if connection.dialect.name == "postgresql":  # where two may both see that none is there
                connection.exec_driver_sql("LOCK TABLE keys IN SHARE ROW EXCLUSIVE MODE")
            inserting = insert(tables.keys).from_select(columns, none_yet)
            made = connection.execute(inserting.returning(tables.keys.c.id)).first()
        return key if made else None

    def all(self) -> list[Key]:
        """Every key, oldest first."""
        with self._books.connect() as connection:
            rows = connection.execute(select(*_COLUMNS).where(_IS_THERE).order_by(tables.keys.c.id))
            return [_key(row) for row in rows.mappings()]

    def has_usable(self) -> bool:
        """Whether there is one that opens anything."""
        return any(key.is_usable(self._now_s()) for key in self.all())

    def find(self, hashed: str) -> Key | None:
        """The key of that hash."""
        with self._books.connect() as connection:
            found = select(*_COLUMNS).where(_IS_THERE, tables.keys.c.hash == hashed)
            row = connection.execute(found).mappings().first()
        return _key(row) if row else None

    def named(self, word: str) -> Key:
        """The key of that name or label, or whose hash begins so; BooksError if it is not one."""
        every = self.all()
        found = [key for key in every if word in (key.name, key.label)]
        if not found and len(word) >= _MIN_DIGITS:
            found = [key for key in every if key.hash.startswith(word.lower())]
        if not found:
            raise BooksError(f"no key is called {word}; pipeline keys list says which there are")
        if len(found) > 1:
            hashes = ", ".join(key.hash[:8] for key in found)
            raise BooksError(f"{len(found)} keys are called {word}; name one by its hash: {hashes}")
        return found[0]

    def change(self, key: Key, columns: Mapping[str, Any]) -> Key | None:
        """As it is then, or None if it has gone; the columns are those of a KeyChange."""
        self._update(key, columns)
        return self.find(key.hash)

    def rotate(self, key: Key) -> str:
        """Give it another text, which is returned; the old one opens nothing any more."""
        text, row = self._new(key.name)
        self._update(key, {"hash": row["hash"], "label": row["label"]})
        return text

    def delete(self, key: Key) -> None:
        """It opens nothing any more; what it was used for stays in the books."""
        self._update(key, {"deleted_ms": self._now_ms()})

    async def check(self, authorization: str | None, x_api_key: str | None = None) -> Key:
        """The key that a request's headers carry; RequestError 401 if it may not pass.

        The books are asked only for a key that was not seen in the last seconds.
        """
        sent = _bearer(authorization) or x_api_key
        if not sent:
            raise RequestError("Missing Authentication header", 401, "authentication")
        # Found by its hash: nothing of the text is ever compared, so no time tells of it.
        hashed = hash_key(sent)
        until_s, key = self._fresh.get(hashed, (0.0, None))
        if key is None or time.monotonic() >= until_s:
            self._fresh.pop(hashed, None)
            key = await asyncio.to_thread(self.find, hashed)
            if key is not None and not key.disabled:
                self._fresh[hashed] = (time.monotonic() + self._cache_s, key)
        if key is None or not key.is_usable(self._now_s()):
            raise RequestError("User not found.", 401, "authentication")
        return key

    def _update(self, key: Key, columns: Mapping[str, Any]) -> None:
        # Not by its hash, which another process may have changed meanwhile.
        changed = update(tables.keys).where(tables.keys.c.id == key.id)
        with self._books.begin() as connection:
            connection.execute(changed.values(**columns, updated_ms=self._now_ms()))
        self._fresh.pop(key.hash, None)

    def _new(self, name: str) -> tuple[str, dict[str, Any]]:
        """A key's text, and its row."""
        digits = secrets.token_hex(32)
        key = PREFIX + digits
        return key, {
            "hash": hash_key(key),
            "label": f"{PREFIX}{digits[:3]}...{digits[-3:]}",
            "name": name,
            "created_ms": self._now_ms(),
            "disabled": False,
        }

    def _now_ms(self) -> int:
        return int(self._now_s() * 1000)


def first_key(keys: Keys) -> str | None:
    """Make the key `first` and return its text, if there is no key at all."""
    return keys.create_first("first")


def hash_key(key: str) -> str:
    """What the books hold in place of a key's text."""
    return hashlib.sha256(key.encode()).hexdigest()


def _key(row: RowMapping) -> Key:
    return Key(**{**row, "models": None if row["models"] is None else tuple(row["models"])})


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
