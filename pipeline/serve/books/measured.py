"""How soon, how fast and how reliably a model was answered at a place, by its rows in the books."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Float, cast, func, select

from pipeline.serve.books import tables

_MINUTE_MS = 60 * 1000
_SPEED_MINUTES = 30
_UPTIME_MINUTES = (5, 30, 24 * 60)
_PERCENT = (50, 75, 90, 99)
FAILURES = ("provider_unavailable", "provider_overloaded", "timeout", "server")
"""The kinds of error that are a server's, with a status of 500 or more."""
_row = tables.generations.c


@dataclass(frozen=True)
class Percentiles:
    """So many of a hundred replies were at least as good."""

    p50: float
    p75: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Measured:
    """None is what cannot be said for want of replies."""

    latency_ms: Percentiles | None = None
    """To the first token, in the last 30 minutes."""
    throughput: Percentiles | None = None
    """Tokens a second from the first to the last, in the last 30 minutes."""
    uptime_last_5m: float | None = None
    """Percent of replies that no server has failed; other errors count on neither side."""
    uptime_last_30m: float | None = None
    uptime_last_1d: float | None = None


UNMEASURED = Measured()


def read_measured(connection: Connection, model: str, provider: str, now_ms: int) -> Measured:
    """Of a model's slug and of who has answered."""
    place = (_row.model == model) & (_row.provider == provider)
    recent = place & (_row.created_ms >= now_ms - _SPEED_MINUTES * _MINUTE_MS)
    made = recent & _row.cache_source.is_(None)
    latency = _row.first_token_ms
    throughput = _row.completion_tokens * 1000.0 / cast(_row.generation_ms, Float)
    return Measured(
        _percentiles(connection, latency, latency.asc(), made & latency.is_not(None)),
        _percentiles(connection, throughput, throughput.desc(), made & (_row.generation_ms > 0)),
        *_uptimes(connection, place, now_ms),
    )


def _percentiles(
    connection: Connection,
    value: ColumnElement[Any],
    best_first: ColumnElement[Any],
    condition: ColumnElement[bool],
) -> Percentiles | None:
    """By the nearest rank: each is of one of the replies."""
    place = func.row_number().over(order_by=best_first).label("place")
    total = func.count().over().label("total")
    ranked = select(value.label("value"), place, total).where(condition).subquery()
    found = connection.execute(
        select(
            *(
                func.max(ranked.c.value).filter(
                    ranked.c.place == (ranked.c.total * percent + 99) // 100
                )
                for percent in _PERCENT
            )
        )
    ).one()
    return None if found[0] is None else Percentiles(*map(float, found))


def _uptimes(connection: Connection, place: ColumnElement[bool], now_ms: int) -> list[float | None]:
    begins_ms = [now_ms - minutes * _MINUTE_MS for minutes in _UPTIME_MINUTES]
    is_failure = _row.error_type.in_(FAILURES)
    counts = [
        count
        for begin_ms in begins_ms
        for count in (
            func.count().filter(_row.created_ms >= begin_ms),
            func.count().filter((_row.created_ms >= begin_ms) & is_failure),
        )
    ]
    told = place & (_row.created_ms >= begins_ms[-1]) & (_row.error_type.is_(None) | is_failure)
    found = connection.execute(select(*counts).where(told)).one()
    return [
        100.0 * (total - failed) / total if total else None
        for total, failed in zip(found[::2], found[1::2], strict=True)
    ]
