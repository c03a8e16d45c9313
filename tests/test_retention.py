"""What is forgotten leaves every sum as it was."""

import asyncio
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from books import generation, hold
from sqlalchemy import Engine, event, func, select

from pipeline.errors import BooksError
from pipeline.serve.books import database as books_module
from pipeline.serve.books import retention, tables
from pipeline.serve.books.database import one_state, open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger, open_ledger
from pipeline.serve.books.retention import forget, forgetting
from pipeline.serve.books.sums import DAY_MS, Scope, read_sums

TODAY = datetime.date(2026, 4, 2)  # a Thursday
ALL_SORTS = ("day", "key", "model", "provider")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_AT_ONCE", 7)
    monkeypatch.setattr(retention, "_PAUSE_S", 0)


@pytest.fixture
def ledger(books: Engine) -> Iterator[Ledger]:
    """With 60 days of replies of two keys and of nobody."""
    for name in ("a", "b"):
        Keys(books).create(name)
    with closing(Ledger(books)) as opened:
        rows = [
            generation(
                number,
                key_id=(1, 2, None)[number % 3],
                model=("m", "n")[number % 2],
                provider=("Pipeline", "Elsewhere")[number % 4 // 2],
                created_ms=midnight_ms(TODAY - datetime.timedelta(days=number // 2)) + number,
                cost_picodollars=10**number % 999_999_999_989,
                error_type=None if number % 5 else "timeout",
                cancelled=number % 7 == 0,
            )
            for number in range(120)
        ]
        for row in rows:
            opened._writer.put(vars(row)).result()
        yield opened


def midnight_ms(day: datetime.date) -> int:
    return int(datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp() * 1000)


def told(books: Engine, ledger: Ledger) -> dict[str, Any]:
    """Everything that is told of sums."""

    async def ask() -> dict[str, Any]:
        first = TODAY - datetime.timedelta(days=90)
        months_ms = [midnight_ms(TODAY.replace(month=month, day=1)) for month in (2, 3, 4)]
        return {
            "spent": [await ledger.spent(key, TODAY) for key in (1, 2, None)],
            "by key": await ledger.spent_by_key(TODAY),
            "days": [await ledger.daily_use(key, first, TODAY) for key in (1, 2, None)],
            "costs": [await ledger.cost(1, begin, months_ms[-1]) for begin in months_ms],
            "cost": await ledger.cost(1, 0),
        }

    with one_state(books) as connection:
        found = read_sums(connection, [], ALL_SORTS, Scope())
    return asyncio.run(ask()) | {"found": found}


def count(books: Engine, table: Any) -> int:
    with books.connect() as connection:
        return connection.scalar(select(func.count()).select_from(table)) or 0


def test_every_sum_is_the_same_after_forgetting(books: Engine, ledger: Ledger) -> None:
    before = told(books, ledger)

    assert forget(books, TODAY - datetime.timedelta(days=9)) == 100
    assert count(books, tables.generations) == 20
    assert told(books, ledger) == before
    assert forget(books, TODAY - datetime.timedelta(days=2)) == 14
    assert forget(books, TODAY - datetime.timedelta(days=2)) == 0
    assert told(books, ledger) == before
    assert before["spent"][0].ever > before["spent"][0].this_month > before["spent"][0].today > 0
    assert asyncio.run(ledger.find(generation(119).id)) is None


def test_replies_that_come_late_for_a_day_that_is_forgotten_are_added(
    books: Engine, ledger: Ledger
) -> None:
    spent = told(books, ledger)["spent"][0].ever
    forget(books, TODAY)
    late = generation(999, key_id=1, cost_picodollars=5, created_ms=midnight_ms(TODAY) - 1)
    asyncio.run(ledger.record(late))

    assert told(books, ledger)["spent"][0].ever == spent + 5
    assert forget(books, TODAY) == 1
    assert told(books, ledger)["spent"][0].ever == spent + 5


def test_what_fails_between_sum_and_deletion_changes_nothing(books: Engine, ledger: Ledger) -> None:
    before = told(books, ledger)
    num_deletions = 0

    def fail(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal num_deletions
        if statement.startswith("DELETE"):
            num_deletions += 1
            if num_deletions == 3:
                raise KeyboardInterrupt

    event.listen(books, "before_cursor_execute", fail)
    with pytest.raises(KeyboardInterrupt):
        forget(books, TODAY)
    event.remove(books, "before_cursor_execute", fail)

    assert count(books, tables.generations) == 120 - 14
    assert told(books, ledger) == before
    assert forget(books, TODAY) == 118 - 14
    assert told(books, ledger) == before


@pytest.mark.postgres
@pytest.mark.parametrize("books_at", ["postgres"], indirect=True)
def test_a_reply_that_is_booked_between_sum_and_deletion_is_not_lost(
    books: Engine, ledger: Ledger, books_at: str
) -> None:
    """In SQLite nobody else can write then."""
    before = told(books, ledger)["cost"]
    late = [generation(999, key_id=1, cost_picodollars=5, created_ms=0)]

    def book(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE") and late:
            with open_books(books_at) as theirs, closing(Ledger(theirs)) as other:
                asyncio.run(other.record(late.pop()))

    event.listen(books, "before_cursor_execute", book)
    forget(books, TODAY)

    assert (late, told(books, ledger)["cost"]) == ([], before + 5)


def test_what_a_dead_server_left_does_not_come_back_after_its_row_was_forgotten(
    books: Engine, ledger: Ledger, books_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books_module, "BUSY_TIMEOUT_S", 0.1)
    again = generation(100, key_id=2, cost_picodollars=1)
    with open_books(books_at) as theirs, theirs.connect() as connection:
        hold(connection)
        with closing(Ledger(books)) as dying:
            asyncio.run(dying.record(again))
    before = told(books, ledger)

    forget(books, TODAY)
    with open_ledger(books) as after:
        assert told(books, after) == before


def test_books_that_are_in_use_are_told_and_what_limits_need_is_kept(
    books: Engine, ledger: Ledger, books_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books_module, "BUSY_TIMEOUT_S", 0.1)
    with open_books(books_at) as theirs, theirs.connect() as connection:
        hold(connection)
        with open_books(books_at) as mine, pytest.raises(BooksError, match="could not be written"):
            forget(mine, TODAY)
    yesterday = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=1)
    with pytest.raises(BooksError, match=f"generations of {yesterday} and later are still needed"):
        forget(books, yesterday + datetime.timedelta(days=1))
    assert forget(books, yesterday) == 120


def test_what_is_old_is_forgotten_now_and_every_hour(
    books: Engine,
    books_at: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(retention, "EVERY_S", 0.01)
    now_ms = int(datetime.datetime.now(datetime.UTC).timestamp() * 1000)

    def book(number: int, days: int) -> None:
        with closing(Ledger(books)) as ledger:
            row = generation(number, created_ms=now_ms - days * DAY_MS)
            asyncio.run(ledger.record(row))

    def wait_until_left(num_rows: int) -> None:
        while count(books, tables.generations) != num_rows:
            time.sleep(0.01)

    for days in range(5):
        book(days, days)
    with forgetting(books_at, 2):
        wait_until_left(3)
        book(9, 9)
        wait_until_left(3)
        with books.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE generations RENAME TO hidden")
        while "is not forgotten" not in caplog.text:
            time.sleep(0.01)


@pytest.mark.slow
def test_a_server_forgets_what_its_file_says(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(
        f"keep_days: 3\nbooks: {tmp_path}\nport: 0\n"
        f"models: [{{slug: me/base, checkpoint: {tiny_base}, engine: llamacpp}}]\n"
    )
    with open_books(str(tmp_path)) as books:
        with closing(Ledger(books)) as ledger:
            asyncio.run(ledger.record(generation()))
        command = [sys.executable, "-m", "pipeline", "serve", "serve.yaml"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(command, cwd=tmp_path, env=environment) as process:
            while count(books, tables.generations) and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
        assert process.returncode == 0
        assert (count(books, tables.generations), count(books, tables.daily_sums)) == (0, 1)
