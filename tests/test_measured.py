"""How fast and reliable endpoints are by the ledger: what is told of it, and what it decides."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from books import generation
from inside import ask
from scripted import ScriptedEngine
from sqlalchemy import Engine, event, insert

from pipeline.chat import Chat
from pipeline.errors import RequestError
from pipeline.serve.api.app import App
from pipeline.serve.asking.preferences import Preferences
from pipeline.serve.asking.request import check_request
from pipeline.serve.books import tables
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.books.measured import UNMEASURED, Measured, Percentiles
from pipeline.serve.offer.catalog import Catalog, Served
from pipeline.serve.routing import measuring
from pipeline.serve.routing.choosing import choose
from pipeline.serve.routing.endpoint import Own
from pipeline.serve.routing.route import find_route

NOW_MS = 1_770_000_000_000
MINUTE_MS = 60 * 1000
WELL: dict[str, Any] = {
    "model": "local/tiny",
    "provider": "Pipeline",
    "error_type": None,
    "cancelled": False,
    "cache_source": None,
    "created_ms": NOW_MS - MINUTE_MS,
}
SCHEMAS = json.loads((Path(__file__).parent / "openrouter_schemas.json").read_text("utf-8"))


def book(books: Engine, *rows: dict[str, Any], first: int = 0) -> None:
    made = [vars(generation(first + n, **{**WELL, **row})) for n, row in enumerate(rows)]
    with books.begin() as connection:
        connection.execute(insert(tables.generations), made)


@pytest.fixture
def ledger(books: Engine) -> Iterator[Ledger]:
    with closing(Ledger(books)) as opened:
        yield opened


def read(ledger: Ledger) -> Measured:
    return asyncio.run(ledger.measured("local/tiny", "Pipeline", NOW_MS))


def test_percentiles_are_of_what_was_made_there_in_the_last_half_hour(
    books: Engine, ledger: Ledger
) -> None:
    replies = [
        {"first_token_ms": n, "completion_tokens": n, "generation_ms": 1000} for n in range(1, 201)
    ]
    absurd = {"first_token_ms": 10**6, "completion_tokens": 10**6, "generation_ms": 1}
    not_counted = [
        {"model": "local/other"},
        {"provider": "Elsewhere"},
        {"created_ms": NOW_MS - 31 * MINUTE_MS},
        {"cache_source": "gen-1"},
    ]
    book(books, *replies, *(absurd | other for other in not_counted))
    book(books, {"first_token_ms": None, "generation_ms": None}, {"generation_ms": 0}, first=500)

    measured = read(ledger)

    # Of 201 first tokens, one more of 100 ms; the best throughput is the highest.
    assert measured.latency_ms == Percentiles(100, 150, 180, 198)
    assert measured.throughput == Percentiles(101, 51, 21, 3)


@pytest.mark.parametrize("error_type", [None, "rate_limit_exceeded", "invalid_request"])
def test_uptime_is_the_share_that_no_server_failed(
    books: Engine, ledger: Ledger, error_type: str | None
) -> None:
    failed = [
        {"error_type": kind, "created_ms": NOW_MS - minutes * MINUTE_MS + 1}
        for kind, minutes in [
            ("provider_unavailable", 5),
            ("provider_overloaded", 30),
            ("timeout", 24 * 60),
            ("server", 24 * 60 + 1),
        ]
    ]
    no_failures = [{"cancelled": True}, {"error_type": error_type}, {}]
    book(books, *failed, *no_failures)
    book(books, {"error_type": "server", "provider": "Elsewhere"}, first=100)

    measured = read(ledger)
    well = 3 if error_type is None else 2

    assert measured.uptime_last_5m == 100 * well / (well + 1)
    assert measured.uptime_last_30m == 100 * well / (well + 2)
    assert measured.uptime_last_1d == 100 * well / (well + 3)


def test_without_replies_nothing_is_measured(books: Engine, ledger: Ledger) -> None:
    book(books, {"error_type": "rate_limit_exceeded", "first_token_ms": None, "generation_ms": 0})

    assert read(ledger) == UNMEASURED


class House:
    """An application and a key to it."""

    def __init__(self, chat: Chat, books: Engine, ledger: Ledger) -> None:
        keys = Keys(books)
        self.key = keys.create("mine")
        catalog = Catalog([Served("tiny", chat, ScriptedEngine(), 1)])
        self.app = App(catalog, keys, ledger, now_s=lambda: NOW_MS / 1000)

    async def endpoint(self, key: str = "") -> Any:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = await ask(self.app, "GET", "/v1/models/local/tiny/endpoints", headers)
        schema = {**SCHEMAS["roots"]["endpoints"], "components": SCHEMAS["components"]}
        jsonschema.Draft202012Validator(schema).validate(answer.json)
        return answer.json["data"]["endpoints"][0]


@pytest.fixture
def house(chat: Chat, books: Engine, ledger: Ledger) -> House:
    return House(chat, books, ledger)


def test_everybody_is_told_the_uptime_and_who_has_a_key_the_speed(
    house: House, books: Engine
) -> None:
    book(books, {"first_token_ms": 250, "completion_tokens": 90, "generation_ms": 1500})

    async def look() -> list[Any]:
        return [await house.endpoint(key) for key in (house.key, "", "sk-or-v1-wrong")]

    known, unknown, wrong = asyncio.run(look())

    assert known["latency_last_30m"] == dict.fromkeys(("p50", "p75", "p90", "p99"), 250.0)
    assert known["throughput_last_30m"] == dict.fromkeys(("p50", "p75", "p90", "p99"), 60.0)
    assert (known["uptime_last_5m"], known["uptime_last_1d"]) == (100.0, 100.0)
    assert unknown == wrong == known | {"latency_last_30m": None, "throughput_last_30m": None}


def test_all_requests_of_ten_seconds_share_what_was_read_once(
    house: House, books: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    book(books, {})
    num_read = 0

    def count(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal num_read
        num_read += "row_number" in statement

    async def look(times: int) -> None:
        await asyncio.gather(*(house.endpoint() for _ in range(times)))

    event.listen(books, "before_cursor_execute", count)
    asyncio.run(look(20))
    asyncio.run(look(20))
    assert num_read == 2  # latency and throughput
    monkeypatch.setattr(measuring, "FRESH_S", 0)
    asyncio.run(look(20))
    assert num_read > 2


def test_what_was_known_is_told_while_the_books_cannot_be_read(
    house: House, books: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measuring, "FRESH_S", 0)
    book(books, {})
    before = asyncio.run(house.endpoint())
    with books.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE generations RENAME TO hidden")

    assert asyncio.run(house.endpoint()) == before
    assert before["uptime_last_1d"] == 100.0
    assert "how local/tiny is answered by Pipeline cannot be read" in caplog.text


def all_of(value: float) -> Percentiles:
    return Percentiles(value, value, value, value)


def endpoints(chat: Chat) -> list[Own]:
    """One that nobody has asked yet, a slow one that talks fast, and a quick one that does not."""
    known = {
        "new": UNMEASURED,
        "late": Measured(Percentiles(900, 900, 900, 5000), Percentiles(90, 80, 70, 9)),
        "soon": Measured(all_of(100), all_of(20)),
    }
    served = Served("tiny", chat, ScriptedEngine(), 1)
    return [Own(served, name, look=lambda place: known[place[1]]) for name in known]


@pytest.mark.parametrize(
    ("wanted", "order"),
    [
        ({}, ["new", "late", "soon"]),
        ({"sort": "exacto"}, ["new", "late", "soon"]),
        ({"sort": "latency"}, ["soon", "late", "new"]),
        ({"sort": {"by": "throughput"}}, ["late", "soon", "new"]),
        ({"sort": "latency", "order": ["late"]}, ["late", "new", "soon"]),
        ({"preferred_max_latency": 0.5}, ["new", "soon", "late"]),
        ({"preferred_max_latency": 0.9}, ["new", "late", "soon"]),
        ({"preferred_max_latency": {"p50": 0.9, "p99": 4.9}}, ["new", "soon", "late"]),
        ({"preferred_min_throughput": 50}, ["new", "late", "soon"]),
        ({"preferred_min_throughput": {"p99": 10}}, ["new", "soon", "late"]),
        ({"sort": "latency", "preferred_min_throughput": 50}, ["late", "new", "soon"]),
    ],
)
def test_who_is_faster_is_tried_first_where_that_is_wanted(
    chat: Chat, wanted: dict[str, Any], order: Sequence[str]
) -> None:
    chosen = choose(endpoints(chat), Preferences.model_validate(wanted), frozenset())

    assert [endpoint.provider for endpoint in chosen] == order


def test_nitro_is_the_fastest_first(chat: Chat) -> None:
    catalog = Catalog([Served("tiny", chat, ScriptedEngine(), 1)])
    request = check_request({"model": "tiny:Nitro", "messages": [{"role": "user", "content": "x"}]})

    route = find_route(request, catalog, lambda _: endpoints(chat))

    assert [endpoint.provider for endpoint in route.endpoints] == ["late", "soon", "new"]


def test_a_cutoff_that_is_no_number_is_refused(chat: Chat) -> None:
    body = {"messages": [], "provider": {"preferred_max_latency": {"p50": "soon"}}}

    with pytest.raises(RequestError, match=r"provider\.preferred_max_latency"):
        check_request(body)
