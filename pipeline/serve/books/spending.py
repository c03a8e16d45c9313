"""What a key has spent, in all and since its limit last began anew."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, cast, func

from pipeline.serve.books import tables
from pipeline.serve.books.allowance import Reset


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


def period_begins_ms(today: datetime.date) -> dict[Reset | None, int]:
    """When the periods of `Spent.by_period` began, in its order; since the epoch."""
    week = today - datetime.timedelta(days=today.weekday())
    begins: dict[Reset | None, datetime.date] = {
        "daily": today,
        "weekly": week,
        "monthly": today.replace(day=1),
    }
    return {None: 0, **{reset: _midnight_ms(day) for reset, day in begins.items()}}


def spent_columns(today: datetime.date) -> list[ColumnElement[Any]]:
    """What `read_spent` makes a Spent of, over rows of generations."""
    column = tables.generations.c
    sums = [
        func.sum(column.cost_picodollars).filter(column.created_ms >= begin_ms)
        for begin_ms in period_begins_ms(today).values()
    ]
    # A sum of no rows is null, and some databases make a decimal of any other.
    whole = [cast(func.coalesce(total, 0), BigInteger) for total in sums]
    return [*whole, func.max(column.created_ms)]


def read_spent(row: Sequence[Any]) -> Spent:
    """The columns' values."""
    ever, today, week, month, last_ms = row
    return Spent(int(ever), int(today), int(week), int(month), last_ms)


def _midnight_ms(day: datetime.date) -> int:
    moment = datetime.datetime.combine(day, datetime.time(), datetime.UTC)
    return int(moment.timestamp() * 1000)
