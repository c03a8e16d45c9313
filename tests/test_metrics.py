"""What Prometheus reads: true counts, of ours and of the engines, and nobody's words or keys."""

import asyncio
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from asking import Refused, Server, chunks
from books import generation
from inside import ask
from prometheus_client.parser import text_string_to_metric_families
from scripted import ScriptedEngine
from sqlalchemy import Engine

from pipeline.chat import Chat
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.logs import Logs
from pipeline.engine.protocol import Engine as Completing
from pipeline.engine.protocol import Sampling
from pipeline.engine.supervisor import OwnEngine, Supervisor
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.monitoring.metrics import Metrics
from pipeline.serve.offer.catalog import Catalog, Served
from pipeline.serve.offer.door import Door

THOUGHT = ["<think>", "hm", "</think>", "ye", "s"]
MESSAGES = [{"role": "user", "content": "a secret question"}]
Values = dict[tuple[str, frozenset[str]], float]


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Engine]:
    with open_books(str(tmp_path)) as opened:
        yield opened


@pytest.fixture
def ledger(books: Engine) -> Iterator[Ledger]:
    with closing(Ledger(books)) as opened:
        yield opened


def read(page: str) -> Values:
    """By a sample's name and the values of its labels."""
    families = list(text_string_to_metric_families(page))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a name stands there twice"
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def value(values: Values, name: str, *labels: str) -> float:
    return values[name, frozenset(labels)]


def fetch(base: str) -> str:
    with urllib.request.urlopen(f"{base}/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain")
        return str(response.read().decode())


async def no_warming(_: Completing) -> None:
    """Nothing to warm."""


class Counting(ScriptedEngine):
    """An engine of ours with a page of its own."""

    is_gone = has_failed = False

    async def metrics(self) -> str:
        return (
            "# HELP vllm:prompt_tokens_total Tokens.\n# TYPE vllm:prompt_tokens_total counter\n"
            'vllm:prompt_tokens_total{model_name="base"} 7\n'
        )


def test_a_reply_is_counted_with_its_tokens_and_its_times(
    serving: Any, books: Engine, ledger: Ledger
) -> None:
    keys = Keys(books)
    key = keys.create("mine", {"priority": "high"})
    with serving(ScriptedEngine(THOUGHT, delay_s=0.002), keys=keys, ledger=ledger) as base:
        usages = [
            Server(f"{base}/api/v1", key).ask(stream, messages=MESSAGES).usage
            for stream in (True, False)
        ]
        page = fetch(base)

    values = read(page)
    assert value(values, "pipeline_requests_total", "local/tiny", "200", "high") == 2
    for kind in ("prompt", "completion"):
        told = sum(usage[f"{kind}_tokens"] for usage in usages)
        assert value(values, "pipeline_tokens_total", "local/tiny", "high", kind) == told
    assert value(values, "pipeline_tokens_total", "local/tiny", "high", "reasoning") == 6
    assert value(values, "pipeline_tokens_total", "local/tiny", "high", "cached") == 6
    first = "pipeline_time_to_first_token_seconds"
    assert value(values, f"{first}_count", "local/tiny", "high") == 2
    assert value(values, f"{first}_bucket", "local/tiny", "high", "+Inf") == 2
    # Of each reply: what was thought, two words of the answer, and its end.
    assert value(values, "pipeline_inter_token_seconds_count", "local/tiny", "high") == 2 * 3
    assert value(values, "pipeline_inter_token_seconds_sum", "local/tiny", "high") > 0
    assert value(values, "pipeline_inter_token_seconds_bucket", "local/tiny", "high", "0.001") < 6
    assert key not in page
    assert key[9:] not in page
    assert "secret" not in page


def test_what_ends_badly_is_counted_by_how_it_ended(serving: Any, ledger: Ledger) -> None:
    with serving(ScriptedEngine(["a", "b"], fails_at=1), ledger=ledger) as base:
        server = Server(f"{base}/v1")
        with pytest.raises(Refused):
            server.ask(messages=MESSAGES, model="nobody/knows-this")
        server.ask(True, messages=MESSAGES)
        page = fetch(base)

    assert value(read(page), "pipeline_requests_total", "", "400", "none") == 1
    assert value(read(page), "pipeline_requests_total", "local/tiny", "502", "none") == 1
    assert "nobody" not in page


def test_whoever_gets_no_further_than_the_door_is_counted(serving: Any, books: Engine) -> None:
    with serving(ScriptedEngine(THOUGHT), keys=Keys(books)) as base:
        with pytest.raises(Refused):
            Server(f"{base}/v1", "sk-or-v1-wrong").ask(messages=MESSAGES)
        page = fetch(base)

    assert value(read(page), "pipeline_requests_total", "", "401", "none") == 1
    assert "wrong" not in page


def test_a_client_that_hangs_up_is_counted_as_one(serving: Any) -> None:
    engine = ScriptedEngine(["word "] * 100_000, delay_s=0.001)
    gone = ("pipeline_requests_total", frozenset({"local/tiny", "499", "none"}))
    with serving(engine) as base:
        with Server(f"{base}/v1").post({"messages": MESSAGES, "stream": True}) as response:
            next(chunks(response))
            open_now = value(read(fetch(base)), "pipeline_open_replies", "", "local/tiny")
        while (values := read(fetch(base))).get(gone) is None:
            time.sleep(0.01)

    assert open_now == 1
    assert values[gone] == 1
    assert value(values, "pipeline_open_replies", "", "local/tiny") == 0


def test_what_an_engine_has_no_room_for_waits_in_the_queue(chat: Chat) -> None:
    door = Door(max_inside=9, slots=2)
    catalog = Catalog([Served("tiny", chat, ScriptedEngine(), 0, engine_name="vllm", door=door)])

    async def enter() -> None:
        async with door.entered():
            await asyncio.sleep(60)

    async def page() -> bytes:
        inside = [asyncio.create_task(enter()) for _ in range(5)]
        await asyncio.sleep(0)
        try:
            return await Metrics().page(catalog, None)
        finally:
            for task in inside:
                task.cancel()

    values = read(asyncio.run(page()).decode())

    assert value(values, "pipeline_open_replies", "vllm", "local/tiny") == 2
    assert value(values, "pipeline_queued_replies", "vllm", "local/tiny") == 3


def test_only_this_machine_reads_without_a_key(chat: Chat, books: Engine) -> None:
    keys = Keys(books)
    app = App(Catalog([Served("tiny", chat, ScriptedEngine(), 0)]), keys)
    key = {"Authorization": f"Bearer {keys.create('mine')}"}

    def status(client: str, headers: dict[str, str] | None = None) -> int:
        asking = ask(app, "GET", "/metrics", headers, client=(client, 5))
        return asyncio.run(asking).status

    assert [status("127.0.0.1"), status("::1"), status("192.0.2.1", key)] == [200] * 3
    assert [status("192.0.2.1"), status("127.0.0.1", {"X-Forwarded-For": "127.0.0.1"})] == [401] * 2


def test_engines_are_told_of_once_each_and_say_what_they_count(chat: Chat) -> None:
    async def start(_: Path) -> OwnEngine:
        return Counting()

    async def check() -> str:
        engines = [
            await Supervisor.start("it", start, no_warming, Logs("test", None)) for _ in range(2)
        ]
        engines[1].num_restarts = 3
        catalog = Catalog(
            [
                Served("a", chat, engines[0], 0, engine_name="vllm"),
                Served("b", chat, engines[1], 0, engine_name="vllm"),
                Served("a-tuned", chat, engines[0], 0, engine_name="vllm", adapter="tuned"),
            ]
        )
        try:
            return (await Metrics().page(catalog, None)).decode()
        finally:
            for engine in engines:
                await engine.close()

    page = asyncio.run(check())

    values = read(page)
    for model, restarts in (("local/a", 0), ("local/b", 3)):
        assert value(values, "vllm:prompt_tokens_total", "base", model) == 7
        assert value(values, "pipeline_engine_up", "vllm", model) == 1
        assert value(values, "pipeline_engine_restarts_total", "vllm", model) == restarts
    assert "a-tuned" not in page


def test_an_engine_that_is_down_leaves_the_rest_of_the_page(chat: Chat) -> None:
    engine = ScriptedEngine()
    asyncio.run(engine.close())
    catalog = Catalog([Served("tiny", chat, engine, 0)])

    values = read(asyncio.run(Metrics().page(catalog, None)).decode())

    assert value(values, "pipeline_engine_up", "", "local/tiny") == 0


def test_llamacpps_own_counters_are_on_the_page(
    tiny_gguf: Path, chat: Chat, tmp_path: Path
) -> None:
    async def start(log: Path) -> OwnEngine:
        return await LlamaCpp.start(tiny_gguf, slots=1, context_tokens=64, log=log)

    async def check() -> str:
        engine = await Supervisor.start("it", start, no_warming, Logs("test", tmp_path))
        try:
            async for _ in engine.generate([5, 6, 7], Sampling(max_tokens=2)):
                pass
            catalog = Catalog([Served("tiny", chat, engine, 0, engine_name="llamacpp")])
            return (await Metrics().page(catalog, None)).decode()
        finally:
            await engine.close()

    values = read(asyncio.run(check()))

    assert value(values, "llamacpp:prompt_tokens_total", "local/tiny") == 3
    assert value(values, "llamacpp:tokens_predicted_total", "local/tiny") > 0


def test_the_ledger_tells_how_far_it_is_behind(chat: Chat, books: Engine, ledger: Ledger) -> None:
    catalog = Catalog([Served("tiny", chat, ScriptedEngine(), 0)])

    async def page() -> Values:
        return read((await Metrics().page(catalog, ledger)).decode())

    before = asyncio.run(page())
    asyncio.run(ledger.record(generation()))
    after = asyncio.run(page())

    names = ("waiting", "spooled", "spooled_oldest_seconds", "last_commit_timestamp_seconds")
    assert [value(before, f"pipeline_ledger_{name}") for name in names] == [0] * 4
    assert value(before, "pipeline_ledger_ready") == 1
    assert value(after, "pipeline_ledger_last_commit_timestamp_seconds") > 1.7e9
    assert value(after, "pipeline_ledger_commit_seconds") > 0
