"""What was asked and answered, summed by model, key, day and the like, to the last reply told."""

import collections
import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

from sqlalchemy import BigInteger, ColumnElement, Connection, Select, cast, func, select

from pipeline.serve.books import tables
from pipeline.serve.books.spool import Row

By = Literal["model", "key", "day", "provider", "app", "user"]
Group = tuple[str | int | None, ...]
"""A key by its id, a day by its number since the epoch; None is what nobody has said."""
EPOCH = datetime.date(1970, 1, 1)
DAY_MS = 24 * 60 * 60 * 1000
_generation, _day = tables.generations.c, tables.daily_sums.c
_OF_GENERATIONS: Mapping[By, ColumnElement[Any]] = {
    "model": _generation.model,
    "key": _generation.key_id,
    "day": _generation.created_ms // DAY_MS,
    "provider": _generation.provider,
    "app": func.coalesce(_generation.app_title, _generation.http_referer),
    "user": _generation.external_user,
}
_OF_DAYS: Mapping[By, ColumnElement[Any]] = {
    "model": _day.model,
    "key": _day.key_id,
    "day": _day.day,
    "provider": _day.provider,
}
_OF_ROWS: Mapping[By, Callable[[Row], str | int | None]] = {
    "model": lambda row: row["model"],
    "key": lambda row: row["key_id"],
    "day": lambda row: row["created_ms"] // DAY_MS,
    "provider": lambda row: row["provider"],
    "app": lambda row: row["app_title"] or row["http_referer"],
    "user": lambda row: row["external_user"],
}


@dataclass(frozen=True)
class Sums:
    """Sums over generations; pico-dollars are whole, so they are exact."""

    requests: int = 0
    errors: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Reasoning included."""
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's."""
    cost_picodollars: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        """Both together."""
        return Sums(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of_row(cls, row: Row) -> "Sums":
        """Of one generation."""
        failed, cancelled = row["error_type"] is not None, bool(row["cancelled"])
        return cls(1, int(failed), int(cancelled), *(int(row[name]) for name in _SUMMED))


COUNTED = ("requests", "errors", "cancelled")
_SUMMED = tuple(Sums.__dataclass_fields__)[len(COUNTED) :]


@dataclass(frozen=True)
class Scope:
    """Which generations are meant."""

    first: datetime.date | None = None
    """By UTC, as the next; None is no bound."""
    last: datetime.date | None = None
    keys: tuple[int | None, ...] | None = None
    """By id, None for who had none; without them, everybody's."""

    def holds(self, row: Row) -> bool:
        """Whether it is one of them."""
        day, begin, end = row["created_ms"] // DAY_MS, *self._days
        is_theirs = self.keys is None or row["key_id"] in self.keys
        return is_theirs and begin <= day < end

    @property
    def _days(self) -> tuple[int, int]:
        """The number of the first, and that after the last."""
        first = (self.first - EPOCH).days if self.first else 0
        return first, (self.last - EPOCH).days + 1 if self.last else 2**31 - 1

    def of_generations(self, found: Select[Any]) -> Select[Any]:
        """A query of them, bounded."""
        begin, end = self._days
        time_ms = _generation.created_ms
        if self.first or self.last:
            found = found.where(time_ms >= begin * DAY_MS, time_ms < end * DAY_MS)
        return self._of_keys(found, _generation.key_id)

    def of_days(self, found: Select[Any]) -> Select[Any]:
        """A query of those that are forgotten, bounded."""
        begin, end = self._days
        return self._of_keys(found.where(_day.day >= begin, _day.day < end), _day.key_id)

    def _of_keys(self, found: Select[Any], column: ColumnElement[Any]) -> Select[Any]:
        if self.keys is None:
            return found
        # Not IS NOT DISTINCT FROM, for which PostgreSQL uses no index.
        one_of = column.in_([key for key in self.keys if key is not None])
        return found.where(one_of | column.is_(None) if None in self.keys else one_of)


def day_of(time_ms: int) -> datetime.date:
    """Of a moment since the epoch, by UTC."""
    return date_of(time_ms // DAY_MS)


def date_of(day: int) -> datetime.date:
    """By its number since the epoch."""
    return EPOCH + datetime.timedelta(days=day)


def sums_of_generations() -> list[ColumnElement[Any]]:
    """Of rows of generations, by the names of its fields."""
    is_failed, is_cancelled = _generation.error_type.is_not(None), _generation.cancelled
    return [
        func.count().label("requests"),
        func.count().filter(is_failed).label("errors"),
        func.count().filter(is_cancelled).label("cancelled"),
        *(whole_sum(_generation[name]).label(name) for name in _SUMMED),
    ]


def sums_of_days() -> list[ColumnElement[Any]]:
    """The same of rows of sums."""
    return [whole_sum(_day[name]).label(name) for name in Sums.__dataclass_fields__]


def read_sums(
    connection: Connection, waiting: Sequence[Row], by: Sequence[By], scope: Scope
) -> dict[Group, Sums]:
    """The sum of each group; `waiting` are rows that the books do not have.

    Of those that are forgotten neither app nor user is known.
    """
    found: dict[Group, Sums] = collections.defaultdict(Sums)

    def add(rows: Select[Any], columns: Mapping[By, ColumnElement[Any]]) -> None:
        known = {word: columns[word].label(f"by_{word}") for word in by if word in columns}
        grouped = rows.add_columns(*known.values()).group_by(*known.values())
        for row in connection.execute(grouped).mappings():
            group = tuple(row[f"by_{word}"] if word in known else None for word in by)
            found[group] += Sums(**{name: int(row[name]) for name in Sums.__dataclass_fields__})

    add(scope.of_generations(select(*sums_of_generations())), _OF_GENERATIONS)
    days: Select[Any] = select(*sums_of_days())
    add(scope.of_days(days), _OF_DAYS)
    for row in waiting:
        if scope.holds(row):
            found[tuple(_OF_ROWS[word](row) for word in by)] += Sums.of_row(row)
    return {group: sums for group, sums in found.items() if sums.requests}


def whole_sum(
    column: ColumnElement[Any], condition: ColumnElement[bool] | None = None
) -> ColumnElement[int]:
    """Of rows that meet the condition, 0 of none; some databases would make a decimal of it."""
    total = func.sum(column)
    chosen = total if condition is None else total.filter(condition)
    return cast(func.coalesce(chosen, 0), BigInteger)
