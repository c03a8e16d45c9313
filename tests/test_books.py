"""The books as a file: made, brought up to date, refused."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from postgres import Postgres
from sqlalchemy import inspect

from pipeline.errors import BooksError
from pipeline.serve.books import migrations
from pipeline.serve.books.database import default_books, open_books
from pipeline.serve.books.tables import metadata


def test_migrations_make_exactly_the_tables_that_the_program_uses(books_at: str):
    with open_books(books_at) as books, books.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        difference = compare_metadata(
            MigrationContext.configure(connection, opts=options), metadata
        )
        made = set(inspect(connection).get_table_names())

    assert difference == []
    assert made == {"alembic_version", *metadata.tables}


def test_the_head_that_is_known_without_alembic_is_the_newest_revision():
    folder = Path(str(migrations.__file__)).parent

    assert ScriptDirectory(str(folder)).get_heads() == [migrations.HEAD]


def test_books_that_are_up_to_date_are_opened_without_alembic(tmp_path: Path):
    program = """
import sys
from pipeline.serve.books.database import open_books
with open_books(sys.argv[1]):
    sys.stdout.write(str("alembic" in sys.modules))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]

    first, second = (subprocess.check_output(command, text=True) for _ in range(2))

    assert (first, second) == ("True", "False")


def test_a_migration_that_fails_leaves_nothing_half_made(tmp_path: Path):
    file = tmp_path / "books.sqlite"
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE generations (something)")
    other.close()

    with pytest.raises(BooksError, match="generations already exists"), open_books(str(file)):
        pass

    with sqlite3.connect(file) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("generations",)]
    other.close()


def test_books_of_a_newer_program_are_refused(tmp_path: Path):
    with open_books(str(tmp_path)) as books, books.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0999'")

    with (
        pytest.raises(
            BooksError, match=rf"newer version .* \(tables 0999, known here {migrations.HEAD}\)"
        ),
        open_books(str(tmp_path)),
    ):
        pass


def test_a_file_that_is_no_database_is_refused_and_not_touched(tmp_path: Path):
    file = tmp_path / "notes.txt"
    file.write_text("some notes of somebody's, long enough to be no database header" * 100)
    before = file.read_bytes()

    with pytest.raises(BooksError, match=r"notes\.txt .* not a database"), open_books(str(file)):
        pass

    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("{folder}/file/books.sqlite", "file: File exists"),
        ("sqlite://", "in memory would be lost"),
        ("nonsense://host/books", "nonsense"),
        ("://", "no database URL"),
    ],
)
def test_what_cannot_hold_books_is_refused_in_one_sentence(where: str, reason: str, tmp_path: Path):
    (tmp_path / "file").touch()

    with (
        pytest.raises(BooksError, match=reason) as refused,
        open_books(where.format(folder=tmp_path)),
    ):
        pass

    assert "\n" not in str(refused.value)
    assert "--books" in str(refused.value)


@pytest.mark.parametrize("host", ["host", "host:port"])
def test_a_refusal_never_says_the_password_of_a_database_url(host: str):
    url = f"nonsense://somebody:hunter2@{host}/books"

    with pytest.raises(BooksError) as refused, open_books(url):
        pass

    assert "hunter2" not in str(refused.value)


def test_one_file_is_meant_by_its_path_its_folder_and_its_url(tmp_path: Path):
    wheres = [str(tmp_path / "books.sqlite"), str(tmp_path), f"sqlite:///{tmp_path}/books.sqlite"]
    for where in wheres:
        with open_books(where) as books:
            assert books.url.database == str(tmp_path / "books.sqlite")


def test_without_a_name_the_books_lie_in_the_users_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    with open_books():
        pass

    assert default_books() == tmp_path / "state" / "pipeline" / "books.sqlite"
    assert default_books().stat().st_mode & 0o777 == 0o600


@pytest.mark.postgres
def test_servers_that_start_at_once_over_an_empty_database_all_find_its_tables(postgres: Postgres):
    program = """
import sys
from pipeline.serve.books.database import open_books
with open_books(sys.argv[1]):
    pass
"""
    command = [sys.executable, "-c", program, postgres.create_database()]
    starting = [subprocess.Popen(command) for _ in range(4)]

    assert [process.wait() for process in starting] == [0] * 4


def test_readers_do_not_wait_for_a_writer_and_commits_reach_the_disk(tmp_path: Path):
    with open_books(str(tmp_path)) as books, books.connect() as connection:
        pragmas = ("journal_mode", "synchronous", "foreign_keys")
        found = [connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() for pragma in pragmas]

    assert found == ["wal", 2, 1]
