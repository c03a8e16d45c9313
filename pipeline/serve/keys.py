"""Keys: whoever sends one may use the server; the books hold only what tells a right one."""

import asyncio
import hashlib
import secrets
import time
from dataclasses import dataclass

from sqlalchemy import Engine, exists, insert, literal, select

from pipeline.errors import BooksError, RequestError
from pipeline.serve import tables

PREFIX = "sk-or-v1-"
CACHE_S = 5.0
"""How long a key that was changed may still be taken for what it was."""


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


class Keys:
    """The keys in the books."""

    def __init__(self, books: Engine, cache_s: float = CACHE_S):
        self._books = books
        self._cache_s = cache_s
        self._fresh: dict[str, tuple[float, Key]] = {}

    def create(self, name: str) -> str:
        """Make a key and return its text, which nobody can ask for again."""
        if not name.strip():
            raise BooksError("a key needs a name that says whose it is")
        key, row = _new_key(name)
        with self._books.begin() as connection:
            connection.execute(insert(tables.keys).values(row))
        return key

    def create_first(self, name: str) -> str | None:
        """The same if there is no key at all, else None; of several processes one makes it."""
        key, row = _new_key(name)
        columns = [tables.keys.c[column] for column in row]
        values = [
            literal(value, column.type) for column, value in zip(columns, row.values(), strict=True)
        ]
        none_yet = select(*values).where(~exists(select(tables.keys.c.id)))
        with self._books.begin() as connection:
            if connection.dialect.name == "postgresql":  # where two may both see that none is there
                connection.exec_driver_sql("LOCK TABLE keys IN SHARE ROW EXCLUSIVE MODE")
            inserting = insert(tables.keys).from_select(columns, none_yet)
            made = connection.execute(inserting.returning(tables.keys.c.id)).first()
        return key if made else None

    def all(self) -> list[Key]:
        """Every key, oldest first."""
        with self._books.connect() as connection:
            rows = connection.execute(select(tables.keys).order_by(tables.keys.c.id))
            return [Key(**row) for row in rows.mappings()]

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
            key = await asyncio.to_thread(self._find, hashed)
            if key is None or key.disabled:
                raise RequestError("User not found.", 401, "authentication")
            self._fresh[hashed] = (time.monotonic() + self._cache_s, key)
        return key

    def _find(self, hashed: str) -> Key | None:
        with self._books.connect() as connection:
            found = select(tables.keys).where(tables.keys.c.hash == hashed)
            row = connection.execute(found).mappings().first()
        return Key(**row) if row else None


def first_key(keys: Keys) -> str | None:
    """Make the key `first` and return its text, if there is no key at all."""
    return keys.create_first("first")


def hash_key(key: str) -> str:
    """What the books hold in place of a key's text."""
    return hashlib.sha256(key.encode()).hexdigest()


def _new_key(name: str) -> tuple[str, dict[str, object]]:
    """A key's text, and its row."""
    digits = secrets.token_hex(32)
    key = PREFIX + digits
    return key, {
        "hash": hash_key(key),
        "label": f"{PREFIX}{digits[:3]}...{digits[-3:]}",
        "name": name,
        "created_ms": time.time_ns() // 1_000_000,
        "disabled": False,
    }


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
