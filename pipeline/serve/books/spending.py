"""What a key has spent, in all and since its limit last began anew."""

import collections
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, bindparam, func, select

from pipeline.serve.books import tables
from pipeline.serve.books.allowance import Reset
from pipeline.serve.books.spool import Row
from pipeline.serve.books.sums import DAY_MS, EPOCH, Scope, whole_sum

NEVER_MS = (2**31 - 1) * DAY_MS
_generation, _day = tables.generations.c, tables.daily_sums.c


@dataclass(frozen=True)
class Spent:
    """What a key's replies have cost, in pico-dollars, by UTC."""

    ever: int = 0
    today: int = 0
    this_week: int = 0
    """Since Monday."""
    this_month: int = 0
    last_ms: int | None = None
    """When the latest was asked for, since the epoch."""

    @property
    def by_period(self) -> dict[Reset | None, int]:
        """By how often a limit begins anew."""
        return {
            None: self.ever,
            "daily": self.today,
            "weekly": self.this_week,
            "monthly": self.this_month,
        }

    def __add__(self, other: "Spent") -> "Spent":
        """Both together."""
        return Spent(
            self.ever + other.ever,
            self.today + other.today,
            self.this_week + other.this_week,
            self.this_month + other.this_month,
            max(self.last_ms or 0, other.last_ms or 0) or None,
        )


def period_begins_ms(today: datetime.date) -> dict[Reset | None, int]:
    """When the periods of `Spent.by_period` began, in its order; since the epoch."""
    week = today - datetime.timedelta(days=today.weekday())
    begins: dict[Reset | None, datetime.date] = {
        "daily": today,
        "weekly": week,
        "monthly": today.replace(day=1),
    }
    return {None: 0, **{reset: (day - EPOCH).days * DAY_MS for reset, day in begins.items()}}


def read_spent(
    connection: Connection, waiting: Sequence[Row], today: datetime.date, scope: Scope
) -> dict[int | None, Spent]:
    """By each key that has asked for something; `waiting` are rows that the books do not have."""
    begins_ms = list(period_begins_ms(today).values())
    begin_days = [begin_ms // DAY_MS for begin_ms in begins_ms]
    generations = _periods(_generation.cost_picodollars, _generation.created_ms, begins_ms)
    days = _periods(_day.cost_picodollars, _day.day, begin_days)
    found: dict[int | None, Spent] = collections.defaultdict(Spent)
    for key_id, last_ms, columns, bounded in (
        (_generation.key_id, _generation.created_ms, generations, scope.of_generations),
        (_day.key_id, _day.last_ms, days, scope.of_days),
    ):
        query = bounded(select(key_id, *columns, func.max(last_ms))).group_by(key_id)
        for key, ever, of_day, of_week, of_month, last in connection.execute(query):
            found[key] += Spent(int(ever), int(of_day), int(of_week), int(of_month), last)
    for row in filter(scope.holds, waiting):
        cost, asked_ms = int(row["cost_picodollars"]), row["created_ms"]
        ever, of_day, of_week, of_month = (cost * (asked_ms >= begin) for begin in begins_ms)
        found[row["key_id"]] += Spent(ever, of_day, of_week, of_month, asked_ms)
    return dict(found)


def read_cost(
    connection: Connection, waiting: Sequence[Row], key_id: int, begin_ms: int, end_ms: int
) -> int:
    """Of a key's replies that were asked for between these midnights, in pico-dollars."""
    words = {"key": key_id, "begin_ms": begin_ms, "end_ms": end_ms}
    words |= {"first_day": begin_ms // DAY_MS, "end_day": end_ms // DAY_MS}
    return int(connection.scalar(_COST, words) or 0) + sum(
        int(row["cost_picodollars"])
        for row in waiting
        if row["key_id"] == key_id and begin_ms <= row["created_ms"] < end_ms
    )


def _cost_of_a_key() -> Select[int]:
    booked = select(whole_sum(_generation.cost_picodollars)).where(
        _generation.key_id == bindparam("key"),
        _generation.created_ms >= bindparam("begin_ms"),
        _generation.created_ms < bindparam("end_ms"),
    )
    forgotten = select(whole_sum(_day.cost_picodollars)).where(
        _day.key_id == bindparam("key"),
        _day.day >= bindparam("first_day"),
        _day.day < bindparam("end_day"),
    )
    return select(booked.scalar_subquery() + forgotten.scalar_subquery())


_COST = _cost_of_a_key()  # once: to put it together takes longer than to ask it


def _periods(
    cost: ColumnElement[Any], time: ColumnElement[Any], begins: Sequence[int]
) -> list[ColumnElement[int]]:
    """What was spent since each of these times."""
    return [whole_sum(cost, time >= begin) for begin in begins]
