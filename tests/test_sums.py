"""What clients were told that their replies cost is what the books say, to the pico-dollar."""

import asyncio
import datetime
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from books import hold
from inside import Answer, ask
from postgres import Postgres
from scripted import ScriptedEngine
from sqlalchemy import Engine

from pipeline.chat import Chat
from pipeline.errors import BooksError
from pipeline.serve.api.app import App
from pipeline.serve.books import database as books_module
from pipeline.serve.books import writer
from pipeline.serve.books.database import open_books
from pipeline.serve.books.key_list import describe_keys
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.books.pending import insert_missing
from pipeline.serve.books.retention import forget
from pipeline.serve.offer.catalog import Catalog, Served
from pipeline.serve.offer.price import Price, usd_text

NOON_S = datetime.datetime(2026, 3, 31, 12, tzinfo=datetime.UTC).timestamp()  # a Tuesday
DAY_S = 24 * 60 * 60
PRICE = Price(prompt=33_333, completion=777_777_777_777, cached=11, request=7)


@pytest.fixture(autouse=True)
def impatient_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the books stays in the spool until the ledger is closed."""
    monkeypatch.setattr(books_module, "BUSY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(writer, "RETRY_S", 600)


@dataclass
class House:
    """An application with prices and a clock, and what each of two keys was told."""

    books: Engine
    ledger: Ledger
    chat: Chat
    now_s: float = NOON_S
    told: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = Keys(self.books, now_s=lambda: self.now_s)
        engine = ScriptedEngine(["a", "b", "c"])
        catalog = Catalog([Served("tiny", self.chat, engine, 1, price=PRICE)])
        self.app = App(catalog, keys, self.ledger, now_s=lambda: self.now_s)
        self.told = {keys.create(name): 0 for name in ("one", "two")}
        self.managing = keys.create("manages", is_management=True)

    def get(self, key: str, path: str) -> Answer:
        headers = {"Authorization": f"Bearer {key}"}
        return asyncio.run(ask(self.app, "GET", f"/v1{path}", headers))

    def chatter(self, times: int) -> None:
        """So many requests of the first key, and one of the second."""
        for key in [next(iter(self.told))] * times + list(self.told)[1:]:
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": times % 4 + 1}
            headers = {"Authorization": f"Bearer {key}"}
            sent = json.dumps(body).encode()
            answer = asyncio.run(ask(self.app, "POST", "/v1/chat/completions", headers, sent))
            self.told[key] += round(answer.json["usage"]["cost"] * 10**12)

    def check(self) -> None:
        """Both keys, and all of them together."""
        for key, told in self.told.items():
            assert self.get(key, "/key").json["data"]["usage"] == told / 10**12
            assert self.get(key, "/credits").json["data"]["total_usage"] == told / 10**12
        total = sum(self.told.values()) / 10**12
        assert self.get(self.managing, "/credits").json["data"]["total_usage"] == total

    def activity(self, key: str) -> list[Any]:
        return list(self.get(key, "/activity").json["data"])


@pytest.fixture
def house(chat: Chat, books: Engine) -> Iterator[House]:
    with closing(Ledger(books)) as ledger:
        yield House(books, ledger, chat)


@contextmanager
def locked(books_at: str) -> Iterator[None]:
    with open_books(books_at) as theirs, theirs.connect() as connection:
        hold(connection)
        yield


def test_rows_that_wait_are_in_every_sum_once_before_while_and_after_they_are_brought_in(
    house: House, books_at: str
) -> None:
    house.chatter(2)
    house.check()
    with locked(books_at):
        house.chatter(3)
        assert house.ledger.state.num_spooled == 4
        house.check()

    insert_missing(house.books, house.ledger._writer.spool.rows[:2])
    house.check()
    insert_missing(house.books, house.ledger._writer.spool.rows)
    house.check()
    house.ledger._writer.spool.drop(4)
    house.check()


def test_what_waits_in_another_process_is_in_its_fellows_sums_too(
    house: House, books_at: str
) -> None:
    house.chatter(1)
    with closing(Ledger(house.books)) as theirs:
        fellow = House(house.books, theirs, house.chat)
        fellow.told, fellow.managing = house.told, house.managing
        with locked(books_at):
            fellow.chatter(2)
            assert (house.ledger.state.num_spooled, theirs.state.num_spooled) == (0, 3)
            house.check()
            house.chatter(1)
            house.check()
            fellow.check()


def test_the_list_of_keys_has_what_waits_in_a_server(house: House, books_at: str) -> None:
    with locked(books_at):
        house.chatter(2)
        described = describe_keys(house.books)

    for line, told in zip(described, house.told.values(), strict=False):
        assert f"used {usd_text(told)} USD" in line


def test_activity_says_the_same_once_the_day_is_over_by_the_applications_clock(
    house: House, books_at: str
) -> None:
    house.chatter(2)
    with locked(books_at):
        house.chatter(1)
        house.now_s += DAY_S  # past midnight, with rows in the spool
        house.chatter(1)  # which are of a day that is not over
        first = {key: house.activity(key) for key in house.told}
        house.now_s += DAY_S
        second = {key: house.activity(key) for key in house.told}

    for key, told in house.told.items():
        (item,) = first[key]
        assert item["date"] == "2026-03-31"
        assert [item["date"] for item in second[key]] == ["2026-04-01", "2026-03-31"]
        assert second[key][1] == item
        assert sum(round(item["usage"] * 10**12) for item in second[key]) == told
    spool, april = house.ledger._writer.spool, datetime.date(2026, 4, 1)
    insert_missing(house.books, spool.rows)
    with pytest.raises(BooksError, match="4 replies of a running server wait to be booked"):
        forget(house.books, april)
    spool.drop(4)
    assert forget(house.books, april) == 5
    assert {key: house.activity(key) for key in house.told} == second
    house.check()


@pytest.mark.parametrize("reset", ["daily", "weekly", "monthly"])
def test_a_limit_counts_what_waits_and_what_is_forgotten(
    house: House, books_at: str, reset: str
) -> None:
    key = Keys(house.books).create("limited", {"limit_picodollars": 10**15, "limit_reset": reset})
    house.told = {key: 0}
    house.chatter(1)
    forget(house.books, datetime.date(2026, 4, 1))
    with locked(books_at):
        house.chatter(1)
        left = house.get(key, "/key").json["data"]["limit_remaining"]

    assert left == (10**15 - house.told[key]) / 10**12


@pytest.mark.postgres
def test_sums_are_exact_again_as_soon_as_postgresql_is_back(chat: Chat, postgres: Postgres) -> None:
    with open_books(postgres.create_database()) as books, closing(Ledger(books)) as ledger:
        house = House(books, ledger, chat)
        house.chatter(1)
        postgres.stop()
        try:
            house.chatter(2)
            assert {house.get(key, "/key").status for key in house.told} == {503}
        finally:
            postgres.start()
        assert ledger.state.num_spooled == 3
        house.check()
        insert_missing(books, ledger._writer.spool.rows)
        house.check()
