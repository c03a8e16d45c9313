"""What was used, for people and their spreadsheets: a line for each group that is asked for."""

import datetime
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import BooksError
from pipeline.serve.books import tables
from pipeline.serve.books.database import one_state, shown, why
from pipeline.serve.books.pending import bring_in, not_booked, pending_folder, read_waiting
from pipeline.serve.books.sums import By, Group, Scope, Sums, date_of, read_sums
from pipeline.serve.offer.price import usd_text

log = logging.getLogger(__name__)

_SHOWN_DIGITS = 8
COLUMNS = (
    *("requests", "errors", "cancelled"),
    *("prompt_tokens", "completion_tokens", "reasoning_tokens", "cached_tokens", "usd"),
)


@dataclass(frozen=True)
class Line:
    """A group by the words that it was asked for, and its sums."""

    group: tuple[str, ...]
    """Empty is what nobody has said, or who had no key."""
    sums: Sums

    @property
    def numbers(self) -> tuple[str, ...]:
        """Under COLUMNS, exact."""
        counts = (str(getattr(self.sums, name)) for name in COLUMNS[:-1])
        return (*counts, usd_text(self.sums.cost_picodollars))


def read_report(books: Engine, by: Sequence[By], scope: Scope) -> list[Line]:
    """Sorted by the groups' words; BooksError if the books cannot be read.

    A running server may keep rows for books that are in use: they are counted.
    """
    folder = pending_folder(books.url)
    try:
        bring_in(books, folder)
    except SQLAlchemyError as error:
        log.warning("replies that a killed server has cut off are not counted: %s", why(error))
    waiting = read_waiting(folder)
    try:
        with one_state(books) as connection:
            found = read_sums(connection, not_booked(connection, waiting), by, scope)
            keys = _names_of_keys(connection) if "key" in by else {}
    except SQLAlchemyError as error:
        raise BooksError(f"{shown(books.url)} cannot be read: {why(error)}; try again") from error
    return sorted(
        (Line(_in_words(group, by, keys), sums) for group, sums in found.items()),
        key=lambda line: line.group,
    )


def parse_by(text: str) -> tuple[By, ...]:
    """Words with commas between, each once; BooksError for one that is none of By."""
    known: dict[str, By] = {word: word for word in get_args(By)}
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise BooksError(f"--by: {word!r} is none of {', '.join(known)}, with commas between")
    return tuple(dict.fromkeys(known[word] for word in words))


def parse_day(text: str, option: str) -> datetime.date:
    """BooksError names the option whose text it is."""
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise BooksError(f"{option}: {text[:40]!r} is no day such as 2027-01-31") from error


def _names_of_keys(connection: Connection) -> dict[int, str]:
    """By id, also of such as are deleted; the digits tell apart those of one name."""
    key = tables.keys.c
    found = connection.execute(select(key.id, key.name, key.hash))
    return {row.id: f"{row.name} {row.hash[:_SHOWN_DIGITS]}" for row in found}


def _in_words(group: Group, by: Sequence[By], keys: dict[int, str]) -> tuple[str, ...]:
    def say(word: By, value: str | int | None) -> str:
        if value is None:
            return ""
        if word == "key":
            return keys[int(value)]
        if word == "day":
            return date_of(int(value)).isoformat()
        return str(value)

    return tuple(say(word, value) for word, value in zip(by, group, strict=True))
