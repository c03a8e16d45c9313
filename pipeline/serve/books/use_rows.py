"""Rows of what keys' requests use of their limits, checked and written under the key's lock."""

import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)

from pipeline.serve.books import tables
from pipeline.serve.books.keys import Key
from pipeline.serve.books.sums import whole_sum
from pipeline.serve.books.uses import (
    Most,
    Unaffordable,
    too_many_requests,
    too_many_streams,
    too_many_tokens,
)
from pipeline.serve.books.window import WAIT_S, WINDOW_S

LEASE_S = 30.0
"""How long a process is believed to live; then its requests hold nothing any more."""
_KEPT_S = 24 * 60 * 60  # a cost that never came into the books counts for so long
_WINDOW_MS = int(WINDOW_S * 1000)
_use, _generation = tables.uses.c, tables.generations.c


class UseRows:
    """Those of one process, among all others."""

    def __init__(self, books: Engine, now_s: Callable[[], float] = time.time) -> None:
        """Minutes pass by `now_s`, since the epoch."""
        self._books = books
        self._now_s = now_s
        self._process = uuid4().hex

    @property
    def now_ms(self) -> int:
        """Since the epoch."""
        return int(self._now_s() * 1000)

    def say_alive(self) -> None:
        """Now; `LEASE_S` begins anew."""
        process, now_ms = tables.processes.c, self.now_ms
        with self._books.begin() as connection:
            seen = update(tables.processes).where(process.id == self._process)
            if not connection.execute(seen.values(seen_ms=now_ms)).rowcount:
                row = {"id": self._process, "seen_ms": now_ms}
                connection.execute(insert(tables.processes).values(row))

    def forget(self) -> None:
        """What counts for nothing any more."""
        process, now_ms = tables.processes.c, self.now_ms
        is_known = or_(_use.cost_picodollars == 0, _is_booked())
        is_over = or_(is_known, _use.ended_ms < now_ms - _KEPT_S * 1000)
        is_past = _use.ended_ms < now_ms - _WINDOW_MS
        is_nobodys = _use.ended_ms.is_(None) & _use.process.not_in(select(process.id))
        is_gone = process.seen_ms < now_ms - 10 * LEASE_S * 1000
        with self._books.begin() as connection:
            connection.execute(delete(tables.processes).where(is_gone))
            connection.execute(delete(tables.uses).where(or_(is_past & is_over, is_nobodys)))

    def leave(self) -> None:
        """What this process holds is free."""
        with self._books.begin() as connection:
            ours = tables.processes.c.id == self._process
            connection.execute(delete(tables.processes).where(ours))

    def begin(self, use_id: str, key: Key) -> None:
        """One more; LimitReached if that is too many."""
        now_ms = self.now_ms
        row = {"id": use_id, "key_id": key.id, "process": self._process, "begun_ms": now_ms}
        recent = _use.begun_ms > now_ms - _WINDOW_MS
        with self._books.begin() as connection:
            _lock(connection, key)
            under_way = func.count().filter(self._is_under_way(now_ms))
            counts = select(under_way, func.count().filter(recent)).where(_use.key_id == key.id)
            num_under_way, num_recent = connection.execute(counts).one()
            if key.streams is not None and num_under_way >= key.streams:
                raise too_many_streams(key.streams, num_under_way)
            most = key.requests_per_minute
            if most is not None and num_recent >= most:
                times = select(_use.begun_ms).where(_use.key_id == key.id, recent)
                following = times.order_by(_use.begun_ms).offset(num_recent - most).limit(1)
                wait_ms = (connection.scalar(following) or now_ms) + _WINDOW_MS - now_ms
                raise too_many_requests(most, num_recent, wait_ms / 1000)
            connection.execute(insert(tables.uses).values(row | {"tokens": 0}))

    def reserve(self, use_id: str, key: Key, most: Most, earlier: int) -> None:
        """It may use so much; LimitReached or Unaffordable if that is more than is left.

        `earlier` is what was spent before `recent_ms`.
        """
        now_ms = self.now_ms
        columns: dict[str, Any] = {"ended_ms": None}
        with self._books.begin() as connection:
            _lock(connection, key)
            if key.tokens_per_minute is not None:
                granted = min(most.tokens, key.tokens_per_minute)
                self._check_tokens(connection, use_id, key, granted, now_ms)
                columns["tokens"] = granted
            if key.limit_picodollars is not None:
                spent = earlier + self._spent(connection, use_id, key, most, now_ms)
                if most.cost > key.limit_picodollars - spent:
                    raise Unaffordable(key.limit_picodollars - spent)
                columns["cost_picodollars"] = most.cost
            connection.execute(update(tables.uses).where(_use.id == use_id).values(columns))

    def _check_tokens(
        self, connection: Connection, use_id: str, key: Key, granted: int, now_ms: int
    ) -> None:
        most = key.tokens_per_minute
        assert most is not None
        under_way = self._is_under_way(now_ms)
        of_others = (_use.key_id == key.id, _use.id != use_id)
        counts = or_(under_way, _use.ended_ms > now_ms - _WINDOW_MS)
        used = _sum(connection, _use.tokens, *of_others, counts)
        if used + granted <= most:
            return
        wait_s, left = float(WAIT_S), used
        ended = select(_use.ended_ms, _use.tokens).where(*of_others, _use.ended_ms.is_not(None))
        for ended_ms, tokens in connection.execute(ended.where(counts).order_by(_use.ended_ms)):
            left -= tokens
            if left + granted <= most:
                wait_s = (ended_ms + _WINDOW_MS - now_ms) / 1000
                break
        raise too_many_tokens(most, used, wait_s)

    def _spent(self, connection: Connection, use_id: str, key: Key, most: Most, now_ms: int) -> int:
        """What is in the books and what is held, by one look: what moves is in one of the two."""
        holds = or_(self._is_under_way(now_ms), _use.ended_ms.is_not(None))
        held = (
            select(whole_sum(_use.cost_picodollars))
            .where(_use.key_id == key.id, _use.id != use_id, _use.begun_ms >= most.begin_ms, holds)
            .where(~_is_booked())
        )
        booked = select(whole_sum(_generation.cost_picodollars)).where(
            _generation.key_id == key.id, _generation.created_ms >= most.recent_ms
        )
        both = select(held.scalar_subquery() + booked.scalar_subquery())
        return int(connection.scalar(both) or 0)

    def _is_under_way(self, now_ms: int) -> ColumnElement[bool]:
        process = tables.processes.c
        living = select(process.id).where(process.seen_ms > now_ms - LEASE_S * 1000)
        return _use.ended_ms.is_(None) & _use.process.in_(living)

    def note(self, noted: Mapping[str, Mapping[str, Any]]) -> None:
        """Columns, by the requests they are of."""
        if not noted:
            return
        with self._books.begin() as connection:
            for use_id, columns in noted.items():
                connection.execute(update(tables.uses).where(_use.id == use_id).values(columns))


def _lock(connection: Connection, key: Key) -> None:
    """Until the end of the transaction nobody else looks at this key's uses.

    In SQLite nobody else writes either, and a transaction that had read first could not.
    """
    if connection.dialect.name == "postgresql":  # a lock that rows which name the key do not need
        row = select(tables.keys.c.id).where(tables.keys.c.id == key.id)
        connection.execute(row.with_for_update(key_share=True))
    else:
        nothing = update(tables.keys).where(tables.keys.c.id == key.id)
        connection.execute(nothing.values(id=tables.keys.c.id))


def _is_booked() -> ColumnElement[bool]:
    return exists(select(_generation.id).where(_generation.id == _use.id))


def _sum(connection: Connection, column: ColumnElement[int], *where: ColumnElement[bool]) -> int:
    return int(connection.scalar(select(whole_sum(column)).where(*where)) or 0)
