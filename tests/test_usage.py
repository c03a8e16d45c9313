"""`pipeline usage`: exact sums by whatever is asked for, also of what waits for the books."""

import asyncio
import csv
import datetime
import io
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from typing import Any

import pytest
from books import generation, hold
from sqlalchemy import Engine, select

from pipeline.serve.books import database as books_module
from pipeline.serve.books import tables
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger

DAY_MS = 24 * 60 * 60 * 1000
FIRST = datetime.date(2026, 1, 1)  # of `generation`
ROWS: list[dict[str, Any]] = [
    {"key_id": 1, "model": "b", "error_type": None, "cancelled": False, "cost_picodollars": 1},
    {"key_id": 1, "model": "a", "provider": "Pipeline", "cost_picodollars": 10**18 + 10},
    {"key_id": 2, "model": "a", "app_title": None, "external_user": "=1\x1b[2J", "cancelled": True},
    {"key_id": None, "model": "a", "app_title": None, "http_referer": None, "external_user": None},
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books_module, "BUSY_TIMEOUT_S", 0.1)


@pytest.fixture
def ledger(books: Engine) -> Iterator[Ledger]:
    """With a reply of each of four days, the second of a key that is deleted since."""
    keys = Keys(books)
    for name in ("same", "same"):
        keys.create(name)
    with closing(Ledger(books)) as opened:
        for number, row in enumerate(ROWS):
            at_ms = generation().created_ms + number * DAY_MS
            record(opened, number, created_ms=at_ms, **row)
        keys.delete(keys.all()[1])
        yield opened


def record(ledger: Ledger, number: int, **fields: Any) -> None:
    asyncio.run(ledger.record(generation(number, **fields)))


class Usage:
    """The command over these books."""

    def __init__(self, run: Any, books_at: str) -> None:
        self.run, self.books_at = run, books_at

    def csv(self, *options: str) -> list[dict[str, str]]:
        said = self.run("usage", "--csv", *options, "--books", self.books_at)
        assert (said.code, said.err) == (0, "")
        return list(csv.DictReader(io.StringIO(said.out)))

    def refusal(self, *options: str) -> str:
        said = self.run("usage", *options, "--books", self.books_at)
        assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
        return str(said.err)


@pytest.fixture
def usage(pipeline: Any, books_at: str) -> Usage:
    return Usage(pipeline, books_at)


def test_sums_are_exact_and_sorted(usage: Usage, ledger: Ledger) -> None:
    first, second = usage.csv()

    assert first == {
        "model": "a",
        "requests": "3",
        "errors": "3",
        "cancelled": "3",
        "prompt_tokens": "72",
        "completion_tokens": "270",
        "reasoning_tokens": "180",
        "cached_tokens": "48",
        "usd": "1000010.00000000001",
    }
    assert (second["model"], second["errors"], second["cancelled"]) == ("b", "0", "0")
    assert second["usd"] == "0.000000000001"


def test_every_word_may_be_asked_for_and_all_together(
    usage: Usage, ledger: Ledger, books: Engine
) -> None:
    with books.connect() as connection:
        hashes = list(connection.scalars(select(tables.keys.c.hash).order_by(tables.keys.c.id)))
    of_key = {f"same {hashed[:8]}": count for hashed, count in zip(hashes, (2, 1), strict=True)}

    found = {
        word: {line[word]: int(line["requests"]) for line in usage.csv("--by", word)}
        for word in ("key", "day", "provider", "app", "user")
    }

    assert found["key"] == {"": 1, **of_key}
    assert found["day"] == {f"2026-01-0{number}": 1 for number in (1, 2, 3, 4)}
    assert found["provider"] == {"Elsewhere": 3, "Pipeline": 1}
    assert found["app"] == {"": 1, "An app": 2, "https://example.org": 1}
    assert found["user"] == {"": 1, "=1\\x1b[2J": 1, "somebody": 2}
    together = usage.csv("--by", "model, day,key")
    assert [line["day"][-1] for line in together] == ["2", "3", "4", "1"]
    assert list(together[0])[:3] == ["model", "day", "key"]


@pytest.mark.parametrize(
    ("options", "days"),
    [
        (("--since", "2026-01-03"), "34"),
        (("--until", "2026-01-02"), "12"),
        (("--since", "2026-01-02", "--until", "2026-01-02"), "2"),
        (("--since", "2030-01-01"), ""),
    ],
)
@pytest.mark.parametrize("is_forgotten", [False, True])
def test_days_bound_what_counts_whether_forgotten_or_not(
    usage: Usage, ledger: Ledger, options: tuple[str, ...], days: str, is_forgotten: bool
) -> None:
    if is_forgotten:
        said = usage.run("usage", "forget", "--before", "2026-01-03", "--books", usage.books_at)
        sentence = "2 generations of days before 2026-01-03 are forgotten; their sums stay\n"
        assert said == (0, sentence, "")

    assert [line["day"][-1] for line in usage.csv("--by", "day", *options)] == list(days)


def test_a_table_has_every_digit_and_the_sum_of_all(usage: Usage, ledger: Ledger) -> None:
    said = usage.run("usage", "--by", "model,user", "--books", usage.books_at)
    lines = said.out.splitlines()

    assert (said.code, "\x1b[2J" in said.out) == (0, False)
    assert lines[0].split()[:3] == ["model", "user", "requests"]
    assert [line.split()[0] for line in lines[1:]] == ["a", "a", "a", "b", "all"]
    assert lines[-1].split()[-1] == "1000010.000000000011"


def test_books_in_which_nothing_was_asked_are_told_so(usage: Usage) -> None:
    assert usage.run("usage", "--books", usage.books_at) == (0, "nothing was asked yet\n", "")
    assert usage.csv() == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--by", "model,colour"), "--by: 'colour' is none of model, key, day, provider, app, us"),
        (("--by", ""), "--by: '' is none of"),
        (("--since", "yesterday"), "--since: 'yesterday' is no day such as 2027-01-31"),
        (("--until", "2026-13-01"), "--until: '2026-13-01' is no day"),
        (("--since", "2026-02-02", "--until", "2026-02-01"), "--since 2026-02-02 comes after --un"),
        (("forget", "--before", "9999-01-01"), "generations of 2"),
        (("forget", "--before", "soon"), "--before: 'soon' is no day"),
    ],
)
def test_a_mistake_is_one_sentence(usage: Usage, options: tuple[str, ...], sentence: str) -> None:
    assert f"error: {sentence}" in usage.refusal(*options)


def test_what_waits_for_locked_books_is_counted_once(
    usage: Usage, ledger: Ledger, books_at: str
) -> None:
    before = Decimal(usage.csv()[0]["usd"])
    with open_books(books_at) as theirs, theirs.connect() as connection:
        hold(connection)
        record(ledger, 10, model="a", cost_picodollars=1)
        with closing(Ledger(theirs)) as dying:  # leaves its file behind
            record(dying, 11, model="a", cost_picodollars=10)
            record(dying, 1, model="a", cost_picodollars=100)  # is in the books

    for _ in range(2):
        assert Decimal(usage.csv()[0]["usd"]) == before + Decimal("0.000000000011")


def test_what_was_cut_off_and_cannot_be_booked_yet_is_said_to_be_missing(
    usage: Usage, books: Engine, books_at: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_books(books_at) as theirs, theirs.connect() as connection:
        hold(connection)
        with closing(Ledger(books)) as dying:
            record(dying, 1, model="a")
        assert usage.run("usage", "--csv", "--books", books_at).out.count("\na,1,") == 1

    assert "replies that a killed server has cut off are not counted" in caplog.text
