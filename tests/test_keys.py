"""Keys: made once, kept as a hash, checked without a database on the way."""

import asyncio
import hashlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import Engine, update
from sqlalchemy.exc import DBAPIError

from pipeline.errors import BooksError, RequestError
from pipeline.serve import tables
from pipeline.serve.books import open_books
from pipeline.serve.keys import Key, Keys, first_key

FIRST = """
import sys
from pipeline.serve.books import open_books
from pipeline.serve.keys import Keys, first_key
with open_books(sys.argv[1]) as books:
    sys.stdout.write(first_key(Keys(books)) or "")
"""


def check(keys: Keys, authorization: str | None, x_api_key: str | None = None) -> Key:
    return asyncio.run(keys.check(authorization, x_api_key))


def refusal(keys: Keys, authorization: str | None) -> tuple[int, str, str]:
    with pytest.raises(RequestError) as refused:
        check(keys, authorization)
    return refused.value.status, refused.value.error_type, str(refused.value)


def disable_all(books: Engine) -> None:
    with books.begin() as connection:
        connection.execute(update(tables.keys).values(disabled=True))


def run_at_once(*commands: list[str]) -> list[str]:
    """What processes print that were started together."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    ended = [process.communicate() for process in running]
    assert [
        (process.returncode, error) for process, (_, error) in zip(running, ended, strict=True)
    ] == [(0, "")] * len(commands)
    return [output for output, _ in ended]


def test_a_key_has_the_form_that_openrouters_clients_know(books: Engine):
    text = Keys(books).create("team")
    (key,) = Keys(books).all()

    assert re.fullmatch("sk-or-v1-[0-9a-f]{64}", text)
    assert key.label == f"sk-or-v1-{text[9:12]}...{text[-3:]}"
    assert key.hash == hashlib.sha256(text.encode()).hexdigest()
    assert (key.name, key.disabled) == ("team", False)


def test_the_holder_of_a_key_gets_in_by_either_header(books: Engine):
    keys = Keys(books)
    text, other = keys.create("team"), keys.create("other")

    assert check(keys, f"Bearer {text}").name == "team"
    assert check(keys, f"bearer  {other} ").name == "other"
    assert check(keys, None, text).name == "team"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic dTpw"])
def test_a_request_without_a_key_is_told_so(header: str | None, books: Engine):
    expected = (401, "authentication", "Missing Authentication header")

    assert refusal(Keys(books), header) == expected


def test_a_key_that_is_not_in_the_books_is_refused(books: Engine):
    keys = Keys(books)
    text = keys.create("team")
    wrong = [f"Bearer {text[:-1]}{'0' if text[-1] != '0' else '1'}", f"Bearer {text} x", "Bearer é"]

    assert [refusal(keys, header) for header in wrong] == [
        (401, "authentication", "User not found.")
    ] * 3


def test_a_disabled_key_is_refused_once_the_cache_has_forgotten_it(books: Engine):
    keys, forgetful = Keys(books, cache_s=math.inf), Keys(books, cache_s=0)
    header = f"Bearer {keys.create('team')}"
    check(keys, header)
    check(forgetful, header)

    disable_all(books)

    assert refusal(forgetful, header) == (401, "authentication", "User not found.")
    assert check(keys, header).name == "team"


def test_a_key_seen_lately_is_not_looked_up_again(books: Engine):
    keys = Keys(books, cache_s=math.inf)
    header = f"Bearer {keys.create('team')}"
    check(keys, header)

    with books.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE keys RENAME TO hidden")

    assert check(keys, header).name == "team"
    with pytest.raises(DBAPIError):
        check(Keys(books), header)


def test_a_key_made_after_it_was_refused_gets_in_at_once(books: Engine, tmp_path: Path):
    keys = Keys(books, cache_s=math.inf)
    text = keys.create("team")
    with books.begin() as connection:
        row = connection.execute(tables.keys.select()).mappings().one()
        connection.execute(tables.keys.delete())
    assert refusal(keys, f"Bearer {text}")[0] == 401

    with books.begin() as connection:
        connection.execute(tables.keys.insert().values(dict(row)))

    assert check(keys, f"Bearer {text}").name == "team"


@pytest.mark.parametrize("books_at", ["sqlite"], indirect=True)
def test_the_text_of_a_key_is_nowhere_on_the_disk(books: Engine, tmp_path: Path):
    keys = Keys(books)
    text = keys.create("team")
    check(keys, f"Bearer {text}")

    files = list(tmp_path.iterdir())

    assert any(b"team" in file.read_bytes() for file in files), "the key is not where we looked"
    assert not any(text[9:].encode() in file.read_bytes() for file in files)


def test_only_empty_books_get_a_first_key(books: Engine):
    keys = Keys(books)

    text = first_key(keys)

    assert text is not None
    assert check(keys, f"Bearer {text}").name == "first"
    assert first_key(keys) is None
    disable_all(books)
    assert first_key(keys) is None
    assert len(keys.all()) == 1


def test_a_key_without_a_name_is_refused(books: Engine):
    with pytest.raises(BooksError, match="needs a name"):
        Keys(books).create(" ")


def test_processes_that_make_keys_at_once_all_get_theirs_and_print_nothing_else(tmp_path: Path):
    create = [sys.executable, "-m", "pipeline", "keys", "create"]
    create += ["--books", str(tmp_path / "new" / "books.sqlite")]

    printed = run_at_once(*([*create, "--name", f"team {number}"] for number in range(4)))

    with open_books(str(tmp_path / "new")) as books:
        keys = Keys(books)
        names = [check(keys, f"Bearer {text.removesuffix(chr(10))}").name for text in printed]
        assert names == [f"team {number}" for number in range(4)]
        assert len(keys.all()) == 4


def test_of_servers_that_start_at_once_one_makes_the_first_key(books_at: str):
    printed = run_at_once(*[[sys.executable, "-c", FIRST, books_at]] * 4)

    assert sorted(len(text) for text in printed) == [0, 0, 0, 73]


def test_keys_are_listed_from_the_users_own_books_without_secrets(tmp_path: Path):
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}

    def keys(*arguments: str) -> str:
        command = [sys.executable, "-m", "pipeline", "keys", *arguments]
        return subprocess.check_output(command, env=environment, text=True)

    none_yet = keys("list")
    text = keys("create", "--name", "a team").strip()
    listed = keys("list")

    assert "pipeline keys create" in none_yet
    assert re.fullmatch(
        rf"a team  sk-or-v1-{text[9:12]}\.\.\.{text[-3:]}  \d{{4}}-\d\d-\d\d \d\d:\d\d UTC\n",
        listed,
    )
