"""While the books are away no row is lost and no reply held up; a killed server loses none."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from asking import Server, chunks
from books import generation, hold
from inside import ask
from postgres import Postgres
from scripted import ScriptedEngine
from sqlalchemy import Engine, func, select

from pipeline.chat import Chat
from pipeline.errors import BooksError
from pipeline.serve.api.app import App
from pipeline.serve.books import database as books_module
from pipeline.serve.books import tables, writer
from pipeline.serve.books.database import open_books
from pipeline.serve.books.ledger import Ledger, open_ledger
from pipeline.serve.books.pending import pending_folder
from pipeline.serve.offer.catalog import Catalog, Served

SERVE = """
import sys, time
from pathlib import Path
from running import running
from scripted import ScriptedEngine
from pipeline.chat import Chat
from pipeline.serve.books import database as module
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.offer.catalog import Catalog, Served
from pipeline.serve.books.ledger import open_ledger

module.BUSY_TIMEOUT_S = 0.1
engine = ScriptedEngine(["word "] * int(sys.argv[3]), delay_s=0.005)
with open_books(sys.argv[1]) as books, open_ledger(books) as ledger:
    app = App(Catalog([Served("tiny", Chat(Path(sys.argv[2])), engine, 0)]), None, ledger)
    with running(app) as address:
        sys.stdout.write(address + "\\n")
        sys.stdout.flush()
        time.sleep(600)
"""
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is waited for, at a fraction of the time."""
    monkeypatch.setattr(books_module, "BUSY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(writer, "RETRY_S", 0.05)


@pytest.fixture
def ledger(books: Engine) -> Iterator[Ledger]:
    with closing(Ledger(books)) as opened:
        yield opened


@contextmanager
def locked(books_at: str) -> Iterator[None]:
    """Somebody else writes into the books and does not come to an end."""
    with open_books(books_at) as theirs, theirs.connect() as connection:
        if connection.dialect.name == "postgresql":  # it is patient, unlike the ledger here
            connection.exec_driver_sql("SET lock_timeout = '20s'")
        hold(connection)
        yield


def record(ledger: Ledger, *numbers: int, **changed: Any) -> None:
    for number in numbers:
        asyncio.run(ledger.record(generation(number, **changed)))


def booked(books: Engine) -> list[str]:
    with books.connect() as connection:
        return sorted(connection.scalars(select(tables.generations.c.id)))


def wait_until_booked(books: Engine, *numbers: int) -> None:
    for _ in range(1000):
        if booked(books) == [generation(number).id for number in numbers]:
            return
        time.sleep(0.01)
    raise AssertionError(f"{booked(books)} are in the books")


def left_behind(books: Engine) -> list[Path]:
    return list(pending_folder(books.url).iterdir())


def spooled(books: Engine) -> list[str]:
    """What a crash would leave: the rows in the files themselves."""
    (file,) = pending_folder(books.url).glob("*.spool")
    return [json.loads(line)["id"] for line in file.read_bytes().partition(b"\0")[0].splitlines()]


@contextmanager
def served(books_at: str, chat_folder: Path, num_words: int) -> Iterator[tuple[Server, Any]]:
    """A server as a process of its own, and that process."""
    command = [sys.executable, "-c", SERVE, books_at, str(chat_folder), str(num_words)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield Server(process.stdout.readline().strip() + "/api/v1"), process
        finally:
            process.kill()


def test_rows_wait_in_a_file_while_the_books_are_locked_and_are_booked_once_after(
    books: Engine, ledger: Ledger, books_at: str
) -> None:
    record(ledger, 1)
    with locked(books_at):
        record(ledger, 2, 3)

        assert booked(books) == [generation(1).id]
        assert spooled(books) == [generation(2).id, generation(3).id]
        assert asyncio.run(ledger.find(generation(3).id)) == generation(3)
        assert ledger.state.num_spooled == 2

    wait_until_booked(books, 1, 2, 3)
    record(ledger, 4)
    assert asyncio.run(ledger.find(generation(3).id)) == generation(3)
    assert booked(books)[-1] == generation(4).id


def test_what_comes_while_the_spool_is_emptied_stays_in_it(
    books: Engine, ledger: Ledger, books_at: str
) -> None:
    numbers = list(range(300))
    with locked(books_at):
        record(ledger, *numbers[:100])
    writing = threading.Thread(target=record, args=(ledger, *numbers[100:]))
    writing.start()
    with locked(books_at):
        pass
    writing.join()

    wait_until_booked(books, *numbers)


@pytest.mark.parametrize("books_at", ["sqlite"], indirect=True)
def test_a_disk_that_is_full_loses_no_row(books: Engine, ledger: Ledger) -> None:
    with books.connect() as connection:  # the one connection that is used again
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    numbers = list(range(200))
    record(ledger, *numbers)
    assert len(booked(books)) < 200
    assert ledger.state.num_spooled

    with books.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=1000000")

    wait_until_booked(books, *numbers)


def test_closing_tries_once_more_and_leaves_nothing(
    books: Engine, books_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "RETRY_S", 600)
    with closing(Ledger(books)) as ledger, locked(books_at):
        record(ledger, 1)

    assert booked(books) == [generation(1).id]
    assert left_behind(books) == []


def test_what_a_server_could_not_book_is_booked_by_the_next_one_once(
    books: Engine, books_at: str
) -> None:
    with locked(books_at), closing(Ledger(books)) as ledger:
        record(ledger, 1, 2)
    assert booked(books) == []

    for _ in range(2):
        with open_ledger(books):
            assert booked(books) == [generation(1).id, generation(2).id]
    assert left_behind(books) == []


def test_a_row_that_is_in_the_books_already_stays_as_it_is(books: Engine, books_at: str) -> None:
    with closing(Ledger(books)) as ledger:
        record(ledger, 1)
    with locked(books_at), closing(Ledger(books)) as ledger:
        record(ledger, 1, 2, prompt_tokens=99)

    with open_ledger(books) as ledger:
        assert asyncio.run(ledger.find(generation(1).id)) == generation(1)
        assert booked(books) == [generation(1).id, generation(2).id]


def test_a_row_that_is_not_fit_keeps_no_other_from_the_books(
    books: Engine, books_at: str, caplog: pytest.LogCaptureFixture
) -> None:
    with locked(books_at), closing(Ledger(books)) as ledger:
        record(ledger, 1)
        record(ledger, 2, key_id=99)
        record(ledger, 3)

    with open_ledger(books):
        assert booked(books) == [generation(1).id, generation(3).id]
    assert f"{generation(2).id} is not fit for the books: " in caplog.text


def test_what_another_server_still_keeps_is_left_to_it(books: Engine, books_at: str) -> None:
    with closing(Ledger(books)) as other:
        with locked(books_at):
            record(other, 1)
            files = left_behind(books)
        # Only now can it be started; the other one may empty its spool at any time.
        with open_ledger(books):
            assert all(file.exists() for file in files)


def test_a_line_that_was_cut_off_by_a_crash_is_passed_over(books: Engine, books_at: str) -> None:
    with locked(books_at), closing(Ledger(books)) as ledger:
        record(ledger, 1, 2)
    (file,) = left_behind(books)
    lines = file.read_bytes().partition(b"\0")[0]
    file.write_bytes(lines[:-9])

    with open_ledger(books):
        assert booked(books) == [generation(1).id]


def test_files_of_rows_are_their_users_alone(books: Engine, ledger: Ledger) -> None:
    ledger.follow("gen-1", generation)
    while len(left_behind(books)) < 2:
        time.sleep(0.01)

    assert {file.stat().st_mode & 0o777 for file in left_behind(books)} == {0o600}
    assert pending_folder(books.url).stat().st_mode & 0o777 == 0o700


def test_a_spool_that_cannot_be_written_either_is_told_and_its_rows_are_not_lost(
    books: Engine, ledger: Ledger, books_at: str
) -> None:
    spool = ledger._writer.spool
    writable = spool._descriptor
    with locked(books_at):
        record(ledger, 1)
        spool._descriptor = os.open(spool.file, os.O_RDONLY)
        with pytest.raises(BooksError, match="Bad file descriptor"):
            record(ledger, 2)
        assert not ledger.state.is_ready
        os.close(spool._descriptor)
        spool._descriptor = writable
        record(ledger, 3)

        assert ledger.state.is_ready
        assert spooled(books) == [generation(number).id for number in (1, 2, 3)]

    wait_until_booked(books, 1, 2, 3)


@pytest.mark.parametrize(("bound", "most"), [("MAX_SPOOLED", 1), ("MAX_SPOOLED_S", 0.02)])
def test_a_server_is_not_ready_once_too_much_waits_for_the_books_or_too_long(
    bound: str,
    most: float,
    chat: Chat,
    books: Engine,
    ledger: Ledger,
    books_at: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer, bound, most)
    app = App(Catalog([Served("tiny", chat, ScriptedEngine(), 0)]), None, ledger)

    def status(path: str) -> int:
        return asyncio.run(ask(app, "GET", path)).status

    assert status("/ready") == 200
    with locked(books_at):
        record(ledger, 1, 2)
        time.sleep(0.03)
        assert (status("/ready"), status("/health")) == (503, 200)
    wait_until_booked(books, 1, 2)
    while ledger.state.num_spooled:
        time.sleep(0.01)
    assert status("/ready") == 200


def test_books_that_cannot_be_written_when_a_server_starts_are_refused(
    books: Engine, books_at: str
) -> None:
    with (
        locked(books_at),
        pytest.raises(BooksError, match=r"cannot be written: .* lock.*--books"),
        open_ledger(books),
    ):
        pass


def test_a_reply_ends_with_its_usage_while_the_books_are_locked(
    serving: Any, books: Engine, ledger: Ledger, books_at: str
) -> None:
    with serving(ScriptedEngine(["ye", "s"]), ledger=ledger) as base, locked(books_at):
        for stream in (True, False):
            reply = Server(f"{base}/v1").ask(stream, messages=MESSAGES)
            assert (reply.answer, reply.usage["completion_tokens"]) == ("yes", 3)
        assert len(spooled(books)) == 2


def listen(server: Server, told: list[str]) -> None:
    """Ask until the server is gone; the ids of replies whose usage came are in `told`."""
    with suppress(OSError, HTTPException):
        while True:
            with server.post({"messages": MESSAGES, "stream": True}) as response:
                told.extend(chunk["id"] for chunk in chunks(response) if "usage" in chunk)


@pytest.mark.postgres
def test_a_reply_ends_while_postgresql_is_away_and_is_booked_when_it_is_back(
    serving: Any, postgres: Postgres
) -> None:
    books_at = postgres.create_database()
    with (
        open_books(books_at) as books,
        closing(Ledger(books)) as ledger,
        serving(ScriptedEngine(["ye", "s"]), ledger=ledger) as base,
    ):
        record(ledger, 1)
        postgres.stop()
        try:
            reply = Server(f"{base}/v1").ask(True, messages=MESSAGES)
            assert reply.usage["completion_tokens"] == 3
            assert len(spooled(books)) == 1
            with pytest.raises(BooksError, match="cannot be used as books"), open_books(books_at):
                pass
        finally:
            postgres.start()
        while len(booked(books)) < 2:
            time.sleep(0.01)
        record(ledger, 2)
        assert len(booked(books)) == 3


@pytest.mark.parametrize("is_locked", [False, True])
def test_every_reply_whose_usage_was_told_survives_kill_9(
    is_locked: bool, books: Engine, books_at: str, chat_folder: Path
) -> None:
    told: list[str] = []

    with served(books_at, chat_folder, 5) as (server, process):
        listeners = [threading.Thread(target=listen, args=(server, told)) for _ in range(8)]
        with locked(books_at) if is_locked else nullcontext():
            for listener in listeners:
                listener.start()
            while len(told) < 40:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            for listener in listeners:
                listener.join()
            process.wait()

    with open_ledger(books):
        assert set(told) <= set(booked(books))
        rows = count_whole(books)
    assert len(told) <= rows <= len(told) + len(listeners)


def count_whole(books: Engine) -> int:
    with books.connect() as connection:
        column = tables.generations.c
        found = select(func.count()).where(column.finish_reason == "stop")
        return connection.scalar(found) or 0


def test_a_stream_that_kill_9_has_cut_is_booked_as_cancelled_with_what_was_journalled(
    books: Engine, books_at: str, chat_folder: Path
) -> None:
    with served(books_at, chat_folder, 100_000) as (server, process):
        with server.post({"messages": MESSAGES, "stream": True}) as response:
            arriving, num_chunks = chunks(response), 0
            while journalled(books) < 10:
                num_chunks += bool(next(arriving)["choices"])
            process.send_signal(signal.SIGKILL)
            process.wait()
            response_id = response.headers["X-Generation-Id"]
        at_least = journalled(books)

    with open_ledger(books) as ledger:
        row = asyncio.run(ledger.find(str(response_id)))
        assert row is not None
        assert (row.cancelled, row.finish_reason, row.error_type) == (True, None, None)
        assert row.completion_tokens == at_least >= 10
        assert booked(books) == [response_id]
    assert left_behind(books) == []


def journalled(books: Engine) -> int:
    """Tokens of the one reply under way."""
    lines = [
        json.loads(line)
        for file in pending_folder(books.url).glob("*.journal")
        for line in file.read_bytes().splitlines()
    ]
    return int(lines[-1]["completion_tokens"]) if lines else 0


@pytest.mark.parametrize("is_locked", [False, True])
def test_a_reply_that_has_its_row_is_not_booked_again_from_the_journal(
    is_locked: bool, books: Engine, books_at: str, chat_folder: Path
) -> None:
    with (
        served(books_at, chat_folder, 3) as (server, process),
        locked(books_at) if is_locked else nullcontext(),
    ):
        whole = server.ask(True, messages=MESSAGES)
        process.send_signal(signal.SIGKILL)
        process.wait()

    with open_ledger(books) as ledger:
        (only,) = booked(books)
        row = asyncio.run(ledger.find(only))
    assert row is not None
    assert (row.completion_tokens, row.cancelled) == (whole.usage["completion_tokens"], False)
