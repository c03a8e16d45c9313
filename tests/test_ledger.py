"""The ledger: what `record` has returned for is there, once, whatever happens then."""

import asyncio
import datetime
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from books import generation, hold
from sqlalchemy import Connection, Engine, func, select

from pipeline.errors import BooksError
from pipeline.serve.books import tables
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Generation, Ledger
from pipeline.serve.books.spending import Spent

RECORD_AND_HANG = """
import asyncio, sys, time
from books import generation
from pipeline.serve.books.database import open_books
from pipeline.serve.books.ledger import Ledger

with open_books(sys.argv[1]) as books:
    asyncio.run(Ledger(books).record(generation(7)))
    sys.stdout.write("recorded\\n")
    sys.stdout.flush()
    time.sleep(600)
"""


@pytest.fixture
def ledger(books: Engine) -> Iterator[Ledger]:
    opened = Ledger(books)
    yield opened
    opened.close()


@pytest.fixture
def other_writer(books: Engine, books_at: str) -> Iterator[Connection]:
    """Somebody who holds the write lock until it is told to commit."""
    with open_books(books_at) as theirs, theirs.connect() as connection:
        hold(connection)
        yield connection


def count(books: Engine) -> int:
    with books.connect() as connection:
        return connection.scalar(select(func.count()).select_from(tables.generations)) or 0


def find(ledger: Ledger, generation_id: str) -> Generation | None:
    return asyncio.run(ledger.find(generation_id))


def test_a_generation_is_found_as_it_was_recorded(books: Engine, ledger: Ledger):
    Keys(books).create("team")
    full = generation(1, key_id=Keys(books).all()[0].id)
    optional = ("key_id", "artefact_hash", "finish_reason", "native_finish_reason", "error_type")
    optional += ("first_token_ms", "generation_ms", "http_referer", "app_title")
    optional += ("external_user", "session_id", "user_agent", "preset", "cache_source")
    optional += ("price_version",)
    bare = generation(2, ignored=(), **dict.fromkeys(optional))
    assert all(getattr(full, field.name) not in (None, ()) for field in fields(full))

    for row in (full, bare):
        asyncio.run(ledger.record(row))

    assert [find(ledger, row.id) for row in (full, bare)] == [full, bare]
    assert find(ledger, "gen-of-nobody") is None


def test_a_thousand_generations_of_many_tasks_are_all_there_once(books: Engine, ledger: Ledger):
    rows = [generation(number, prompt_tokens=number) for number in range(1000)]

    async def one_of_many(start: int) -> None:
        for row in rows[start : start + 10]:
            await ledger.record(row)
            assert await ledger.find(row.id) == row

    async def all_at_once() -> None:
        await asyncio.gather(*(one_of_many(start) for start in range(0, 1000, 10)))

    asyncio.run(all_at_once())

    with books.connect() as connection:
        found = connection.execute(select(tables.generations.c["id", "prompt_tokens"])).all()
    assert sorted(found) == [(row.id, row.prompt_tokens) for row in rows]


def test_what_was_recorded_survives_kill_9(books_at: str):
    program = f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]}" + RECORD_AND_HANG
    command = [sys.executable, "-c", program, books_at]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "recorded\n"
        process.send_signal(signal.SIGKILL)

    with open_books(books_at) as books:
        again = Ledger(books)
        assert find(again, generation(7).id) == generation(7)
        again.close()


def test_other_tasks_go_on_while_a_row_waits_for_another_process(
    ledger: Ledger, other_writer: Connection
):
    async def wait_for_the_other() -> bool:
        recording = asyncio.create_task(ledger.record(generation()))
        for _ in range(50):
            await asyncio.sleep(0.001)
        was_waiting = not recording.done()
        other_writer.commit()
        await recording
        return was_waiting

    assert asyncio.run(wait_for_the_other())
    assert find(ledger, generation().id) == generation()


def test_rows_that_gathered_meanwhile_are_one_commit_and_a_bad_one_fails_alone(
    books: Engine, ledger: Ledger, other_writer: Connection
):
    rows = [generation(1), generation(2), generation(2), generation(3, key_id=99), generation(4)]

    async def gather() -> list[BaseException | None]:
        tasks = [asyncio.create_task(ledger.record(row)) for row in rows]
        await asyncio.sleep(0.01)
        other_writer.commit()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(gather())

    assert [outcome is None for outcome in outcomes] == [True, True, False, False, True]
    assert isinstance(outcomes[2], BooksError)
    begin, _, reason = str(outcomes[2]).partition(": ")
    assert begin == f"{generation(2).id} was not written to the books"
    assert "unique constraint" in reason.lower()
    assert "\n" not in reason
    assert "foreign key" in str(outcomes[3]).lower()
    assert count(books) == 3


def test_a_row_whose_caller_has_gone_is_written_all_the_same(
    books: Engine, ledger: Ledger, other_writer: Connection
):
    async def hang_up() -> None:
        rows = [asyncio.create_task(ledger.record(generation(number))) for number in range(3)]
        await asyncio.sleep(0.01)
        for row in rows:
            row.cancel()
        await asyncio.gather(*rows, return_exceptions=True)
        other_writer.commit()
        await ledger.record(generation(3))

    asyncio.run(hang_up())

    assert count(books) == 4


def test_closing_writes_what_is_on_its_way(books: Engine, other_writer: Connection):
    ledger = Ledger(books)

    async def leave_at_once() -> None:
        rows = [asyncio.create_task(ledger.record(generation(number))) for number in range(20)]
        await asyncio.sleep(0)
        other_writer.commit()
        ledger.close()
        assert count(books) == 20
        await asyncio.gather(*rows)

    asyncio.run(leave_at_once())


def test_nothing_is_taken_after_the_end(ledger: Ledger):
    ledger.close()

    with pytest.raises(BooksError, match="after the ledger was closed"):
        asyncio.run(ledger.record(generation()))


def test_what_a_key_has_spent_counts_from_the_beginning_of_day_week_and_month(
    books: Engine, ledger: Ledger
):
    Keys(books).create("team")
    key_id = Keys(books).all()[0].id
    wednesday = datetime.date(2026, 4, 1)
    for number, (day, cost) in enumerate(
        [("2026-04-01", 1), ("2026-03-31", 10), ("2026-03-29", 100), ("2025-04-01", 1000)]
    ):
        at = datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC)
        row = generation(
            number, key_id=key_id, cost_picodollars=cost, created_ms=int(at.timestamp() * 1000)
        )
        asyncio.run(ledger.record(row))
    asyncio.run(ledger.record(generation(9, cost_picodollars=7)))

    last_ms = int(datetime.datetime(2026, 4, 1, tzinfo=datetime.UTC).timestamp() * 1000)
    spent = Spent(1111, 1, 11, 1, last_ms)
    assert asyncio.run(ledger.spent(key_id, wednesday)) == spent
    assert asyncio.run(ledger.spent_by_key(wednesday))[key_id] == spent
    next_day = asyncio.run(ledger.spent(key_id, datetime.date(2026, 4, 2)))
    assert next_day == Spent(1111, 0, 11, 1, last_ms)
    assert asyncio.run(ledger.spent(None, wednesday)).ever == 7
    assert asyncio.run(ledger.spent_by_key(wednesday)).keys() == {key_id, None}
    assert asyncio.run(ledger.spent(99, wednesday)) == Spent()
