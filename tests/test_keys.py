"""Keys: made once, kept as a hash, checked without a database on the way."""

import asyncio
import hashlib
import math
import os
import re
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from books import generation
from sqlalchemy import Engine, update
from sqlalchemy.exc import DBAPIError

from pipeline.errors import BooksError, RequestError
from pipeline.serve.books import tables
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Key, Keys, first_key, hash_key
from pipeline.serve.books.ledger import Ledger

FIRST = """
import sys
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys, first_key
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
        rf"a team  sk-or-v1-{text[9:12]}\.\.\.{text[-3:]}  {hash_key(text)[:8]}"
        r"  made \d{4}-\d\d-\d\d \d\d:\d\d UTC  used 0 USD\n",
        listed,
    )


LIMITS = (
    *("--limit", "2.50", "--limit-reset", "weekly", "--requests-per-minute", "60"),
    *(
        "--tokens-per-minute",
        "9000",
        "--streams",
        "4",
        "--priority",
        "low",
        "--models",
        "me/a, me/b:free",
    ),
    *("--models", "me/a, me/b:free", "--expires", "2099-01-31T12:30"),
)
SAID = (
    "used 1.5 USD  limit 2.5 USD weekly, 2.5 left  60 requests a minute  9000 tokens a minute  "
    "4 at the same time  low priority  asks me/a, me/b:free  expires 2099-01-31 12:30 UTC"
)


class Commands:
    """`pipeline keys` over books of its own, in this process."""

    def __init__(self, run: Any, books: Engine) -> None:
        self._run = run
        self.books = books
        self.keys = Keys(books, cache_s=0)
        self._at = books.url.render_as_string(hide_password=False)

    def __call__(self, *arguments: str) -> str:
        said = self._run("keys", *arguments, "--books", self._at)
        assert said.code == 0, said.err
        return str(said.out)

    def refusal(self, *arguments: str) -> str:
        said = self._run("keys", *arguments, "--books", self._at)
        assert (said.code, said.out) == (2, "")
        return str(said.err)


@pytest.fixture
def commands(pipeline: Any, books: Engine) -> Commands:
    return Commands(pipeline, books)


def create(commands: Commands, name: str, *arguments: str) -> str:
    """The new key's text: the last line, and nothing beside it."""
    text = commands("create", "--name", name, *arguments).splitlines()[-1]
    assert re.fullmatch("sk-or-v1-[0-9a-f]{64}", text)
    return text


def test_a_key_is_made_with_its_limits_and_listed_with_its_use(commands: Commands):
    text = create(commands, "laptop", *LIMITS)
    create(commands, "boss", "--management")
    key, boss = commands.keys.all()
    with closing(Ledger(commands.books)) as ledger:
        row = generation(key_id=key.id, cost_picodollars=1_500_000_000_000, created_ms=0)
        asyncio.run(ledger.record(row))

    first, second = commands("list").splitlines()

    assert first.startswith(f"laptop  {key.label}  {hash_key(text)[:8]}  made ")
    assert first.endswith(SAID)
    assert second.startswith("boss    ")
    assert second.endswith("manages keys")
    assert (boss.is_management, key.is_management) == (True, False)


def test_limits_are_changed_one_by_one_and_taken_away(commands: Commands):
    create(commands, "laptop", *LIMITS)
    before = commands.keys.all()[0]

    shown = commands("limit", "laptop", "--limit", "9", "--streams", "none")
    after = commands.keys.all()[0]

    assert "limit 9 USD weekly, 9 left  60 requests" in shown
    changed = {"limit_picodollars": 9 * 10**12, "streams": None, "updated_ms": after.updated_ms}
    assert after == replace(before, **changed)
    words = ("limit", "limit-reset", "requests-per-minute", "tokens-per-minute", "models")
    commands("limit", "laptop", *(part for word in words for part in (f"--{word}", "none")))
    commands("limit", "laptop", "--expires", "none")
    free = commands.keys.all()[0]
    assert free.limit_picodollars is free.limit_reset is free.models is free.expires_ms is None
    assert free.requests_per_minute is free.tokens_per_minute is None
    assert "nothing to change" in commands.refusal("limit", "laptop")


def test_a_key_is_disabled_and_enabled(commands: Commands):
    header = f"Bearer {create(commands, 'laptop')}"

    assert commands("disable", "laptop").endswith("disabled\n")
    assert refusal(commands.keys, header)[0] == 401
    assert "disabled" not in commands("enable", "laptop")
    assert check(commands.keys, header).name == "laptop"


def test_a_rotated_key_keeps_its_limits_and_its_use_and_loses_its_text(commands: Commands):
    old = create(commands, "laptop", *LIMITS)
    before = commands.keys.all()[0]

    text = commands("rotate", "laptop").splitlines()[-1]
    after = check(commands.keys, f"Bearer {text}")

    assert refusal(commands.keys, f"Bearer {old}")[0] == 401
    new = {name: getattr(after, name) for name in ("hash", "label", "updated_ms")}
    assert after == replace(before, **new)
    assert before.hash != after.hash


def test_a_deleted_key_opens_nothing_and_its_generations_stay(commands: Commands):
    header = f"Bearer {create(commands, 'laptop')}"
    key = check(commands.keys, header)
    with closing(Ledger(commands.books)) as ledger:
        asyncio.run(ledger.record(generation(key_id=key.id)))

        commands("delete", key.label)

        found = asyncio.run(ledger.find(generation().id))
    assert found is not None
    assert found.key_id == key.id
    assert refusal(commands.keys, header)[0] == 401
    assert "no keys yet" in commands("list")
    assert first_key(commands.keys) is not None, "without a key nobody gets in"


def test_a_key_is_named_by_name_label_or_hash_and_only_one_is_meant(commands: Commands):
    create(commands, "twin")
    text = create(commands, "twin")
    first, second = commands.keys.all()

    ambiguous = commands.refusal("disable", "twin")
    commands("disable", hash_key(text)[:8])

    assert f"2 keys are called twin; name one by its hash: {first.hash[:8]}" in ambiguous
    assert [key.disabled for key in commands.keys.all()] == [False, True]
    commands("disable", first.label)
    assert all(key.disabled for key in commands.keys.all())
    assert "no key is called nobody" in commands.refusal("delete", "nobody")
    assert "no key is called" in commands.refusal("delete", second.hash[:3])


@pytest.mark.parametrize(
    ("option", "word", "sentence"),
    [
        ("--limit", "much", "--limit: give a number of US dollars"),
        ("--limit", "-1", "--limit: "),
        ("--limit", "1e9", "--limit: at most 9000000 US dollars"),
        ("--streams", "0", "--streams: "),
        ("--requests-per-minute", "1.5", "--requests-per-minute: "),
        ("--models", "tiny", "--models: 'tiny' is no model such as acme/support"),
        ("--expires", "soon", "--expires: 'soon' is no time"),
        ("--expires", "2020-01-01", "--expires: 2020-01-01 is over"),
        ("--limit-reset", "hourly", "--limit-reset"),
    ],
)
def test_an_option_that_is_wrong_is_named_and_no_key_is_made(
    commands: Commands, option: str, word: str, sentence: str
):
    assert sentence in commands.refusal("create", "--name", "x", option, word)
    assert commands.keys.all() == []


def test_books_of_an_older_program_keep_their_keys_and_what_these_have_spent(tmp_path: Path):
    """Made as revision 0002 made them."""
    with open_books(str(tmp_path)) as books:
        text = Keys(books).create("old")
        with closing(Ledger(books)) as ledger:
            asyncio.run(ledger.record(generation(key_id=1)))
        back_to_0002(books)

    with open_books(str(tmp_path)) as books, closing(Ledger(books)) as ledger:
        key = check(Keys(books), f"Bearer {text}")
        assert (key.name, key.limit_picodollars, key.is_management) == ("old", None, False)
        assert asyncio.run(ledger.spent(key.id, date(2026, 1, 1))).ever == 5 * 10**12


def back_to_0002(books: Engine) -> None:
    new = set(Key.__dataclass_fields__) | {"deleted_ms"}
    new -= {"id", "hash", "label", "name", "created_ms", "disabled"}
    with books.begin() as connection:
        for name in new:
            connection.exec_driver_sql(f"ALTER TABLE keys DROP COLUMN {name}")
        for table in ("uses", "processes"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
        connection.exec_driver_sql("DROP INDEX ix_generations_key_id")
        connection.exec_driver_sql(
            "CREATE INDEX ix_generations_key_id ON generations (key_id, created_ms)"
        )
        for name in ("ix_generations_created_ms", "ix_generations_model"):
            connection.exec_driver_sql(f"DROP INDEX {name}")
        connection.exec_driver_sql("DROP TABLE daily_sums")
        connection.exec_driver_sql("ALTER TABLE generations DROP COLUMN price_version")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0002'")


def test_content_is_logged_of_a_key_only_while_it_says_so(commands: Commands):
    create(commands, "quiet")
    create(commands, "teacher", "--log-content")
    quiet, teacher = commands.keys.all()
    first, second = commands("list").splitlines()

    assert (quiet.log_content, teacher.log_content) == (False, True)
    assert ("content is logged" in first, "content is logged" in second) == (False, True)
    assert commands("limit", "quiet", "--log-content").endswith("content is logged\n")
    assert "content" not in commands("limit", "teacher", "--no-log-content")
    commands("limit", "quiet", "--streams", "3")
    assert [key.log_content for key in commands.keys.all()] == [True, False]
