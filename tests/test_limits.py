"""What a key may use: parallel requests, moved clocks and restarts find no way around a limit."""

import asyncio
import contextlib
import datetime
import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from books import generation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inside import Answer, ask
from postgres import Postgres
from scripted import ScriptedEngine
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from pipeline.chat import Chat
from pipeline.serve.api.app import App
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.books.shared_uses import SharedUses
from pipeline.serve.books.uses import OwnUses
from pipeline.serve.books.window import WINDOW_S
from pipeline.serve.offer.catalog import Catalog, Served
from pipeline.serve.offer.price import Price
from pipeline.serve.routing.endpoint import Answering, Own

NOON = datetime.datetime(2026, 3, 31, 12, tzinfo=datetime.UTC).timestamp()  # a Tuesday
DAY_S = 24 * 60 * 60
MESSAGES = [{"role": "user", "content": "hi"}]
PRICE = Price(prompt=3, completion=10, cached=1, request=7)


@dataclass
class Clock:
    """Moved by hand."""

    now_s: float = NOON

    def __call__(self) -> float:
        return self.now_s


@dataclass
class House:
    """An application with prices over a scripted engine, its books and a clock."""

    chat: Chat
    books: Engine
    ledger: Ledger
    engine: ScriptedEngine
    is_shared: bool
    clock: Clock = field(default_factory=Clock)
    price: Price = PRICE

    def __post_init__(self) -> None:
        self.keys = Keys(self.books, cache_s=0, now_s=self.clock)
        models = [
            Served("tiny", self.chat, self.engine, 1, price=self.price),
            Served("tiny", self.chat, self.engine, 1, variant="free"),
            Served("other", self.chat, self.engine, 1, price=self.price),
        ]
        self.uses = (
            SharedUses(self.books, self.ledger, self.clock)
            if self.is_shared
            else OwnUses(self.ledger, self.clock)
        )
        self.app = App(Catalog(models), self.keys, self.ledger, now_s=self.clock, uses=self.uses)

    def key(self, **columns: Any) -> str:
        is_management = columns.pop("is_management", False)
        return self.keys.create("mine", columns, is_management=is_management)

    async def post(self, key: str, **fields: Any) -> Answer:
        body = json.dumps({"messages": MESSAGES, "max_tokens": 4, **fields}).encode()
        headers = {"Authorization": f"Bearer {key}"}
        if isinstance(self.uses, SharedUses):
            with contextlib.suppress(SQLAlchemyError):  # as it does every few seconds
                await self.uses.sign()
        return await ask(self.app, "POST", "/api/v1/chat/completions", headers, body)

    def ask(self, key: str, **fields: Any) -> Answer:
        return asyncio.run(self.post(key, **fields))

    def get(self, key: str, path: str) -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        return asyncio.run(ask(self.app, "GET", f"/api/v1{path}", headers)).json["data"]

    def spent(self, key: str) -> int:
        """Of the ledger's rows, in pico-dollars."""
        key_id = asyncio.run(self.keys.check(f"Bearer {key}")).id
        return asyncio.run(self.ledger.spent(key_id, datetime.date(2026, 1, 1))).ever


@pytest.fixture(
    params=["own", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)], autouse=True
)
def counted(request: pytest.FixtureRequest) -> str:
    """Where: in the process, or in the books for several processes."""
    return str(request.param)


@pytest.fixture
def books_at(request: pytest.FixtureRequest, counted: str, tmp_path: Path) -> str:
    if counted != "postgres":
        return str(tmp_path)
    server: Postgres = request.getfixturevalue("postgres")
    return server.create_database()


@pytest.fixture
def house(chat: Chat, books: Engine, counted: str) -> Iterator[House]:
    with closing(Ledger(books)) as ledger:
        engine = ScriptedEngine(["a", "b", "c", "d", "e"])
        yield House(chat, books, ledger, engine, counted != "own")


def error(answer: Answer) -> tuple[int, str, str]:
    told = answer.json["error"]
    assert told["code"] == answer.status
    return answer.status, told["metadata"]["error_type"], told["message"]


def cost_of_one(house: House) -> int:
    """What one request of `ask` costs."""
    return round(house.ask(house.key()).json["usage"]["cost"] * 10**12)


def most_of_one(house: House) -> int:
    """What one request of `ask` may cost: nothing cached, every token of the reply."""
    usage = house.ask(house.key()).json["usage"]
    return PRICE.request + PRICE.prompt * usage["prompt_tokens"] + PRICE.completion * 4


@given(
    limit=st.integers(0, 4000),
    asked=st.lists(
        st.tuples(st.integers(1, 8), st.booleans(), st.integers(1, 3)), min_size=1, max_size=12
    ),
    pause_ms=st.integers(0, 2),
)
@settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
def test_parallel_requests_never_overshoot_a_limit(
    house: House, limit: int, asked: list[tuple[int, bool, int]], pause_ms: int
) -> None:
    key = house.key(limit_picodollars=limit)
    house.engine.delay_s = pause_ms / 1000

    async def ask_all() -> list[Answer]:
        requests = [
            house.post(key, max_tokens=most, stream=stream, n=n) for most, stream, n in asked
        ]
        return await asyncio.gather(*requests)

    answers = asyncio.run(ask_all())

    assert {answer.status for answer in answers} <= {200, 402}
    assert house.spent(key) <= limit
    # And no limit is so careful that it grants nothing: what alone is affordable gets through.
    if all(answer.status == 402 for answer in answers):
        assert house.spent(key) == 0
        cheapest = PRICE.request + PRICE.completion + most_of_one(house) - PRICE.completion * 4
        assert limit < cheapest + PRICE.completion * min(most * n for most, _, n in asked)


class LateLedger(Ledger):
    """What it reads it tells only when it may, once it has been told to be late."""

    has_read: asyncio.Event | None = None
    may_tell: asyncio.Event | None = None

    async def cost(self, *asked: Any) -> int:
        read = await super().cost(*asked)
        if self.has_read and self.may_tell:
            self.has_read.set()
            await self.may_tell.wait()
        return read


@pytest.mark.parametrize("counted", ["own"], indirect=True)  # elsewhere one look sees both
def test_a_reply_that_is_booked_while_the_books_are_read_is_not_overlooked(
    house: House, chat: Chat, books: Engine
) -> None:
    key = house.key(limit_picodollars=most_of_one(house))

    async def ask_while_another_ends(late: House, ledger: LateLedger) -> list[int]:
        late.engine.delay_s = 0.01
        first = asyncio.create_task(late.post(key))
        while not late.engine.num_open:
            await asyncio.sleep(0.001)
        ledger.has_read, ledger.may_tell = asyncio.Event(), asyncio.Event()
        second = asyncio.create_task(late.post(key))
        await ledger.has_read.wait()
        answers = [await first]
        ledger.may_tell.set()
        return [answer.status for answer in [*answers, await second]]

    with closing(LateLedger(books)) as ledger:
        late = House(chat, books, ledger, house.engine, house.is_shared)
        assert asyncio.run(ask_while_another_ends(late, ledger)) == [200, 402]


def test_what_was_not_used_of_a_reservation_can_be_spent_again(house: House) -> None:
    cost, most = cost_of_one(house), most_of_one(house)
    assert cost < most, "nothing was cached"
    key = house.key(limit_picodollars=most + 3 * cost)

    statuses = [house.ask(key).status for _ in range(6)]

    assert statuses == [200] * 4 + [402] * 2
    assert house.spent(key) == 4 * cost


def test_a_reply_that_fails_costs_nothing_and_holds_nothing(house: House) -> None:
    key = house.key(limit_picodollars=most_of_one(house))
    house.engine.fails_at = 1

    assert [house.ask(key, stream=True).status for _ in range(3)] == [200] * 3

    house.engine.fails_at = None
    assert (house.spent(key), house.ask(key).status) == (0, 200)


def test_a_client_that_hangs_up_holds_nothing(house: House) -> None:
    key = house.key(limit_picodollars=most_of_one(house), streams=1)
    house.engine.delay_s = 30

    async def hang_up() -> None:
        asking = asyncio.create_task(house.post(key))
        while not house.engine.num_open:
            await asyncio.sleep(0.001)
        assert (await house.post(key)).status == 429
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(hang_up())
    house.engine.delay_s = 0

    assert house.ask(key).status == 200


def test_what_is_too_dear_says_how_many_tokens_are_affordable(house: House) -> None:
    most = most_of_one(house)
    key = house.key(limit_picodollars=most - PRICE.completion - 1)

    refused, affordable = house.ask(key), house.ask(key, max_tokens=2)

    assert error(refused) == (
        402,
        "payment_required",
        "This request requires more credits, or fewer max_tokens. "
        "You requested up to 4 tokens, but can only afford 2.",
    )
    assert affordable.status == 200
    assert len(house.engine.asked) == 2, "the engine was asked for what was refused"


def test_who_has_nothing_left_is_told_so_unless_the_model_is_free(house: House) -> None:
    key = house.key(limit_picodollars=0)

    assert error(house.ask(key))[:2] == (402, "payment_required")
    assert error(house.ask(key))[2].startswith("Insufficient credits: 0 USD are left")
    assert house.ask(key, model="local/tiny:free").status == 200


def test_a_cheaper_model_may_answer_in_the_place_of_one_that_is_too_dear(house: House) -> None:
    key = house.key(limit_picodollars=0)

    answer = house.ask(key, model="local/tiny", models=["local/tiny:free"])

    assert (answer.status, answer.json["model"]) == (200, "local/tiny:free")


@pytest.mark.parametrize(
    ("reset", "same_period", "next_period"),
    [
        ("daily", 11.9 * 60 * 60, 12 * 60 * 60),
        ("weekly", 5.4 * DAY_S, 5.5 * DAY_S),  # from Tuesday noon to Monday
        ("monthly", 0.4 * DAY_S, 0.5 * DAY_S),  # it is the 31st
        (None, 300 * DAY_S, None),
    ],
)
def test_a_limit_begins_anew_when_it_says(
    house: House, reset: str | None, same_period: float, next_period: float | None
) -> None:
    key = house.key(limit_picodollars=most_of_one(house), limit_reset=reset)
    assert house.ask(key).status == 200

    house.clock.now_s = NOON + same_period
    assert house.ask(key).status == 402
    told = house.get(key, "/key")
    assert (told["limit_reset"], told["limit_remaining"] < told["limit"]) == (reset, True)

    if next_period is not None:
        house.clock.now_s = NOON + next_period
        told = house.get(key, "/key")
        assert told["limit_remaining"] == told["limit"]
        assert house.ask(key).status == 200


def test_a_reply_over_midnight_counts_for_the_day_it_was_asked_on(house: House) -> None:
    most = most_of_one(house)
    key = house.key(limit_picodollars=most, limit_reset="daily")
    house.engine.delay_s = 0.02

    async def ask_before_and_after() -> list[int]:
        house.clock.now_s = NOON + DAY_S / 2 - 1
        before = asyncio.create_task(house.post(key, stream=True))
        while not house.engine.num_open:
            await asyncio.sleep(0.001)
        same_day = await house.post(key)
        house.clock.now_s = NOON + DAY_S / 2
        after = await house.post(key)
        again = await house.post(key)
        return [(await before).status, same_day.status, after.status, again.status]

    assert asyncio.run(ask_before_and_after()) == [200, 402, 200, 402]
    assert house.get(key, "/key")["usage_daily"] * 2 == house.get(key, "/key")["usage"]


def test_what_was_spent_is_known_after_a_restart(house: House, chat: Chat) -> None:
    key = house.key(limit_picodollars=most_of_one(house))
    assert house.ask(key).status == 200

    again = House(chat, house.books, house.ledger, house.engine, house.is_shared)

    assert again.ask(key).status == 402


def test_a_limit_that_is_changed_holds_at_once(house: House) -> None:
    key = house.key(limit_picodollars=0)
    assert house.ask(key).status == 402

    house.keys.change(house.keys.all()[0], {"limit_picodollars": 10**12})

    assert house.ask(key).status == 200


def limited(answer: Answer) -> tuple[int, int, int]:
    """Limit, remaining and seconds to wait of a 429, which all three places tell alike."""
    assert error(answer)[:2] == (429, "rate_limit_exceeded")
    assert error(answer)[2].startswith("Rate limit exceeded")
    told = answer.json["error"]["metadata"]["headers"]
    assert {name: answer.headers[name.lower()] for name in told} == told
    assert set(told) == {"X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"}
    return (
        int(told["X-RateLimit-Limit"]),
        int(told["X-RateLimit-Remaining"]),
        int(answer.headers["retry-after"]),
    )


def test_so_many_requests_in_any_minute(house: House) -> None:
    key = house.key(requests_per_minute=2)

    first = house.ask(key)
    house.clock.now_s += 10
    second = house.ask(key)
    third = house.ask(key)

    assert (first.status, second.status) == (200, 200)
    assert not [name for name in first.headers if name.startswith("x-ratelimit")]
    assert limited(third) == (2, 0, 50)
    reset_ms = int(third.headers["x-ratelimit-reset"])
    assert reset_ms == int((house.clock.now_s + 50) * 1000)
    assert len(house.engine.asked) == 2

    house.clock.now_s = NOON + WINDOW_S
    assert [house.ask(key).status for _ in range(2)] == [200, 429]
    assert house.ask(house.key()).status == 200, "another key's limit"


def test_so_many_tokens_in_any_minute(house: House) -> None:
    usage = house.ask(house.key()).json["usage"]
    one = usage["prompt_tokens"] + 4
    key = house.key(tokens_per_minute=2 * one + 1)

    assert [house.ask(key).status for _ in range(2)] == [200, 200]
    house.clock.now_s += 15
    assert limited(house.ask(key)) == (2 * one + 1, 1, 45)

    house.clock.now_s = NOON + WINDOW_S
    assert house.ask(key).status == 200


def test_tokens_of_replies_under_way_count_and_what_they_do_not_use_is_given_back(
    house: House,
) -> None:
    usage = house.ask(house.key()).json["usage"]
    key = house.key(tokens_per_minute=2 * usage["prompt_tokens"] + 20)

    async def ask_at_once() -> list[int]:
        answers = [house.post(key, max_tokens=15), house.post(key, max_tokens=15)]
        return sorted(answer.status for answer in await asyncio.gather(*answers))

    assert asyncio.run(ask_at_once()) == [200, 429]
    assert house.ask(key, max_tokens=14).status == 200


def test_a_request_that_may_use_more_than_a_minutes_tokens_has_one_to_itself(house: House) -> None:
    key = house.key(tokens_per_minute=1)

    assert [house.ask(key).status for _ in range(2)] == [200, 429]
    house.clock.now_s += WINDOW_S
    assert house.ask(key).status == 200


def test_so_many_requests_at_the_same_time(house: House) -> None:
    key = house.key(streams=2)
    house.engine.delay_s = 0.1

    async def ask_at_once() -> list[Answer]:
        return await asyncio.gather(
            *(house.post(key, stream=number % 2 == 0) for number in range(5))
        )

    answers = asyncio.run(ask_at_once())

    assert sorted(answer.status for answer in answers) == [200, 200, 429, 429, 429]
    assert {limited(answer) for answer in answers if answer.status == 429} == {(2, 0, 1)}
    assert house.ask(key).status == 200


def test_the_skins_tell_a_limit_in_their_own_shapes(house: House) -> None:
    key = house.key(requests_per_minute=1)
    body = json.dumps({"input": "hi", "messages": MESSAGES, "max_tokens": 4}).encode()

    async def ask_each() -> list[Answer]:
        paths = ("/v1/completions", "/v1/responses", "/v1/messages")
        headers = {"x-api-key": key}
        await house.post(key)
        return [await ask(house.app, "POST", path, headers, body) for path in paths]

    completions, responses, messages = asyncio.run(ask_each())

    assert [a.status for a in (completions, responses, messages)] == [429] * 3
    assert completions.headers["x-ratelimit-limit"] == messages.headers["x-ratelimit-limit"] == "1"
    assert responses.json["error"]["metadata"]["headers"]["X-RateLimit-Limit"] == "1"
    assert messages.json["error"]["type"] == "rate_limit_error"


def test_a_key_asks_only_its_models(house: House) -> None:
    key = house.key(models=["Local/tiny"])

    assert house.ask(key).status == house.ask(key, model="tiny:free").status == 200
    assert error(house.ask(key, model="local/other")) == (
        403,
        "permission_denied",
        "local/other is not for this key, which may ask Local/tiny",
    )
    fallback = house.ask(key, model="local/other", models=["local/tiny"])
    assert (fallback.status, fallback.json["model"]) == (200, "local/tiny")
    shown = [model["id"] for model in house.get(key, "/models/user")]
    assert shown == ["local/tiny", "local/tiny:free"]
    assert len(house.get(house.key(), "/models/user")) == 3


def test_a_key_that_is_over_or_disabled_or_deleted_opens_nothing(house: House) -> None:
    over = house.key(expires_ms=int((NOON + 5) * 1000))
    assert house.ask(over).status == 200
    house.clock.now_s += 5
    disabled, deleted = house.key(disabled=True), house.key()
    house.keys.delete(house.keys.all()[-1])

    for key in (over, disabled, deleted):
        assert error(house.ask(key)) == (401, "authentication", "User not found.")


def test_a_key_is_over_on_time_also_while_it_is_remembered(house: House, books: Engine) -> None:
    keys = Keys(books, cache_s=3600, now_s=house.clock)
    object.__setattr__(house.app, "keys", keys)
    key = house.key(expires_ms=int((NOON + 5) * 1000))

    assert house.ask(key).status == 200
    house.clock.now_s += 5
    assert house.ask(key).status == 401


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
def test_a_management_key_asks_for_no_reply(house: House, path: str) -> None:
    headers = {"Authorization": f"Bearer {house.key(is_management=True)}"}
    body = json.dumps({"messages": MESSAGES, "input": "x", "prompt": "x"}).encode()

    refused = asyncio.run(ask(house.app, "POST", f"/api/v1/{path}", headers, body))

    assert refused.status == 403
    assert "management key" in refused.json["error"]["message"]
    assert not house.engine.asked


@pytest.mark.parametrize("counted", ["own", "sqlite"], indirect=True)
def test_no_key_is_written_to_the_books_or_the_log(
    house: House, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = house.key(limit_picodollars=10**9, requests_per_minute=3)
    text = house.keys.rotate(house.keys.all()[0])
    statuses = [house.ask(sent).status for sent in (key, text, text, text, text)]

    assert statuses == [401, 200, 200, 200, 429]
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert any(b"mine" in content for content in written), "the books are not where we looked"
    for secret in (key[9:], text[9:]):
        assert not any(secret.encode() in content for content in written)
        assert secret not in caplog.text


def test_what_is_in_the_books_counts_whenever_and_wherever_it_was_spent(house: House) -> None:
    """Another process may write it while this one serves."""
    most, cost = most_of_one(house), cost_of_one(house)
    key = house.key(limit_picodollars=40_000 + most + cost)
    key_id = house.keys.all()[-1].id

    def record(number: int, days_ago: float) -> None:
        created_ms = int((NOON - days_ago * DAY_S) * 1000)
        row = generation(number, key_id=key_id, cost_picodollars=10_000, created_ms=created_ms)
        asyncio.run(house.ledger.record(row))

    record(1, 80)
    record(2, 0.7)
    assert house.ask(key).status == 200
    record(3, 1.4)
    record(4, 0)
    assert [house.ask(key).status for _ in range(2)] == [200, 402]
    house.clock.now_s += 3 * DAY_S
    assert house.ask(key).status == 402
    assert house.spent(key) == 40_000 + 2 * cost


def test_a_request_at_midnight_is_held_to_the_day_that_it_counts_for(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt is read for so long that the next day begins meanwhile."""
    key = house.key(limit_picodollars=most_of_one(house), limit_reset="daily")
    house.clock.now_s = NOON + DAY_S / 2 - 1
    assert house.ask(key).status == 200
    prepare = Own.prepare

    async def prepare_slowly(endpoint: Own, *asked: Any) -> Answering:
        house.clock.now_s = NOON + DAY_S / 2
        return await prepare(endpoint, *asked)

    monkeypatch.setattr(Own, "prepare", prepare_slowly)

    assert [house.ask(key).status for _ in range(3)] == [402, 200, 402]


@pytest.mark.parametrize("counted", ["own", "sqlite"], indirect=True)
def test_while_the_books_cannot_be_read_a_limited_key_waits_and_another_does_not(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    free, limited_key = house.key(), house.key(limit_picodollars=10**12)
    object.__setattr__(house.app, "keys", Keys(house.books, cache_s=3600))
    assert (house.ask(free).status, house.ask(limited_key).status) == (200, 200)
    with house.books.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE generations RENAME TO hidden")

    refused = house.ask(limited_key)

    assert error(refused)[:2] == (503, "provider_overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert house.ask(free).status == 200
    assert "generations" in caplog.text
    assert "SELECT" not in caplog.text, "the log quotes rows"
