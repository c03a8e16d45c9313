"""Who may ask, and what the books say of it afterwards."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from asking import Refused, Server, chunks
from scripted import ScriptedEngine
from sqlalchemy import Engine

from pipeline.errors import EngineDown
from pipeline.serve.api import exchange
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Generation, Ledger

THOUGHT = ["<think>", "hm", "</think>", "ye", "s"]
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Engine]:
    with open_books(str(tmp_path)) as opened:
        yield opened


@pytest.fixture
def ledger(books: Engine) -> Iterator[Ledger]:
    with closing(Ledger(books)) as opened:
        yield opened


def find(ledger: Ledger, generation_id: str | None) -> Generation:
    """As soon as it is there."""
    for _ in range(500):
        found = asyncio.run(ledger.find(str(generation_id)))
        if found is not None:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{generation_id} is not in the ledger")


def test_only_a_key_opens_the_door(serving: Any, books: Engine) -> None:
    keys = Keys(books)
    key = keys.create("mine")
    with serving(ScriptedEngine(THOUGHT), keys=keys) as base:
        assert Server(f"{base}/api/v1", key).ask(messages=MESSAGES).answer == "yes"
        for wrong, words in (("", "Missing"), (key[:-1] + "x", "User not found")):
            with pytest.raises(Refused, match=words) as caught:
                Server(f"{base}/api/v1", wrong).ask(messages=MESSAGES)
            assert (caught.value.status, caught.value.error_type) == (401, "authentication")
            assert key not in str(caught.value)


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_is_in_the_ledger_before_its_usage_is_told(
    serving: Any, books: Engine, ledger: Ledger, stream: bool
) -> None:
    keys = Keys(books)
    key = keys.create("mine")
    with serving(ScriptedEngine(THOUGHT), keys=keys, ledger=ledger) as base:
        body = {"messages": MESSAGES, "stream": stream, "user": "me", "top_a": 1}
        with Server(f"{base}/api/v1", key).post(body) as response:
            told = list(chunks(response))[-1] if stream else json.loads(response.read())
            row = asyncio.run(ledger.find(str(response.headers["X-Generation-Id"])))

    assert row is not None
    assert (row.prompt_tokens, row.completion_tokens, row.reasoning_tokens) == (
        told["usage"]["prompt_tokens"],
        told["usage"]["completion_tokens"],
        3,
    )
    assert (row.model, row.finish_reason, row.streamed) == ("local/tiny", "stop", stream)
    assert (row.external_user, row.ignored, row.cancelled) == ("me", ("top_a",), False)
    assert row.key_id == keys.all()[0].id
    assert row.first_token_ms is not None
    assert row.latency_ms >= row.first_token_ms


def test_a_client_that_reads_no_more_is_taken_for_gone(
    serving: Any, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "STALLED_S", 0.2)
    engine = ScriptedEngine(["word " * 2000] * 100_000)
    with serving(engine, ledger=ledger) as base:
        server = Server(f"{base}/v1")
        with server.post({"messages": MESSAGES, "stream": True}) as response:
            reply_id = next(chunks(response))["id"]
            row = find(ledger, reply_id)
            assert (row.cancelled, engine.num_open) == (True, 0)
        slow = ScriptedEngine(["word "] * 3, delay_s=0.5)
    with serving(slow, ledger=ledger) as base:
        assert Server(f"{base}/v1").ask(True, messages=MESSAGES).answer == "word word word "


def test_a_hang_up_is_booked_with_what_was_said_so_far(serving: Any, ledger: Ledger) -> None:
    engine = ScriptedEngine(["word "] * 100_000, delay_s=0.01)
    with serving(engine, ledger=ledger) as base:
        server = Server(f"{base}/api/v1")
        with server.post({"messages": MESSAGES, "stream": True}) as response:
            next(chunks(response))
        row = find(ledger, response.headers["X-Generation-Id"])

    assert (row.cancelled, row.finish_reason) == (True, None)
    assert 0 < row.completion_tokens <= engine.num_given


def test_a_failure_is_booked_with_its_type(serving: Any, ledger: Ledger) -> None:
    with serving(ScriptedEngine(["a", "b"], fails_at=1), ledger=ledger) as base:
        with Server(f"{base}/api/v1").post({"messages": MESSAGES, "stream": True}) as response:
            assert list(chunks(response))[-1]["error"]["code"] == 502
        row = find(ledger, response.headers["X-Generation-Id"])

    assert (row.error_type, row.finish_reason) == ("provider_unavailable", "error")
    assert (row.completion_tokens, row.cancelled) == (1, False)


def test_books_that_cannot_be_written_hold_no_reply_up(
    serving: Any, ledger: Ledger, caplog: Any
) -> None:
    ledger.close()
    with serving(ScriptedEngine(THOUGHT), ledger=ledger) as base:
        assert Server(f"{base}/api/v1").ask(True, messages=MESSAGES).answer == "yes"
    assert "after the ledger was closed" in caplog.text


def test_who_cannot_be_looked_up_is_told_to_come_back(serving: Any, books: Engine) -> None:
    with books.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE keys RENAME TO hidden")
    with (
        serving(ScriptedEngine(THOUGHT), keys=Keys(books)) as base,
        Server(f"{base}/v1", "sk-or-v1-any").post({"messages": MESSAGES}) as response,
    ):
        body = json.loads(response.read())

    assert (response.status, response.headers["Retry-After"]) == (503, "5")
    assert "books" in body["error"]["message"]


def test_an_engine_that_is_down_says_when_to_come_back(serving: Any) -> None:
    class Down(ScriptedEngine):
        """As a supervisor is while it starts its engine again."""

        async def generate(self, *asked: Any) -> Any:
            for _ in asked:
                raise EngineDown("the engine is down", 7)
            yield

    with serving(Down()) as base, Server(f"{base}/api/v1").post({"messages": MESSAGES}) as response:
        body = json.loads(response.read())

    assert (response.status, response.headers["Retry-After"]) == (503, "7")
    assert body["error"]["metadata"]["error_type"] == "provider_overloaded"
