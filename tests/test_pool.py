"""Several engines at URLs as one: who is asked, who is left out, who comes back."""

import asyncio
import subprocess
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web
from elsewhere import free_port, llamacpp_at
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.engine import pool as module
from pipeline.engine.choose import choose_engine, connect
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.pool import Pool
from pipeline.engine.protocol import PLAIN, Delta, Engine, Lane, Sampling
from pipeline.errors import EngineDown, EngineError, EngineRefused

SHORT = Sampling(max_tokens=100, temperature=0.0)


class Remote(ScriptedEngine):
    """An engine at a URL, which may be away or unwell."""

    is_well = True
    fails_with: EngineError | None = None

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, lane: Lane = PLAIN
    ) -> AsyncGenerator[Delta, None]:
        self.lanes.append(lane)
        if self.fails_with is not None:
            raise self.fails_with
        async for delta in super().generate(prompt_ids, sampling, lane):
            yield delta

    async def is_healthy(self) -> bool:
        return self.is_well


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_S", 0.02)
    monkeypatch.setattr(module, "backoff_s", lambda num_failures: 0.01 * num_failures)


@asynccontextmanager
async def pooling(engines: dict[str, Remote]) -> AsyncGenerator[Pool, None]:
    async def reach(url: str) -> Engine:
        if not engines[url].is_well:
            raise EngineError(f"{url} does not answer")
        return engines[url]

    pool = await Pool.at(list(engines), reach)
    try:
        yield pool
    finally:
        await pool.close()


def two() -> dict[str, Remote]:
    return {"http://a": Remote(), "http://b": Remote()}


async def say(engine: Engine, prompt_ids: Sequence[int] = (1,), lane: Lane = PLAIN) -> str:
    return "".join([delta.text async for delta in engine.generate(prompt_ids, SHORT, lane)])


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


def counts(engines: dict[str, Remote]) -> list[int]:
    return [len(engine.asked) for engine in engines.values()]


def test_requests_that_begin_alike_go_to_one_engine_and_others_are_spread() -> None:
    async def talk() -> None:
        engines = two()
        async with pooling(engines) as pool:
            for last in range(20):
                await say(pool, [*range(40), last])
            assert sorted(counts(engines)) == [0, 20]
            for first in range(20):
                await say(pool, [first, *range(40)])
                await say(pool, [0], Lane(cache_salt=str(first)))
            assert min(counts(engines)) >= 10

    asyncio.run(talk())


def test_a_favourite_with_too_many_replies_under_way_is_passed_over() -> None:
    async def talk() -> None:
        engines = two()
        for engine in engines.values():
            engine.delay_s = 0.05
        async with pooling(engines) as pool:
            await asyncio.gather(*(say(pool) for _ in range(20)))
            assert abs(counts(engines)[0] - counts(engines)[1]) <= module.MAX_DETOUR + 1

    asyncio.run(talk())


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_failure_before_the_first_token_is_tried_once_on_another(fails_at: int) -> None:
    async def talk() -> None:
        engines = two()
        async with pooling(engines) as pool:
            await say(pool)
            favourite, other = sorted(engines.values(), key=lambda engine: -len(engine.asked))
            favourite.fails_at = fails_at
            if fails_at == 0:
                assert await say(pool) == "hello"
            else:
                with pytest.raises(EngineError, match="has died"):
                    await say(pool)
            assert (len(favourite.asked), len(other.asked)) == (2, 1 - fails_at)
            favourite.fails_at = other.fails_at = 0
            with pytest.raises(EngineError, match="has died"):
                await say(pool)
            assert (len(favourite.asked), len(other.asked)) == (3, 2 - fails_at)

    asyncio.run(talk())


def test_a_refusal_is_the_answer_and_not_tried_elsewhere() -> None:
    async def talk() -> None:
        engines = two()
        async with pooling(engines) as pool:
            for engine in engines.values():
                engine.fails_with = EngineRefused("too long")
            for _ in range(5):
                with pytest.raises(EngineRefused):
                    await say(pool)
            assert sum(len(engine.lanes) for engine in engines.values()) == 5
            assert await pool.is_healthy()

    asyncio.run(talk())


def test_who_fails_is_left_out_until_well_again(impatient: None) -> None:
    async def talk() -> None:
        engines = two()
        async with pooling(engines) as pool:
            await say(pool)
            favourite, other = sorted(engines.values(), key=lambda engine: -len(engine.asked))
            favourite.is_well = False
            await until(lambda: any(member.is_out for member in pool._members))
            assert await say(pool) == "hello"
            assert (len(favourite.asked), len(other.asked)) == (1, 1)
            other.is_well = False
            await until(lambda: all(member.is_out for member in pool._members))
            assert not await pool.is_healthy()
            with pytest.raises(EngineDown, match="no engine answers at http://a, http://b"):
                await say(pool)
            favourite.is_well = True
            await until(lambda: not all(member.is_out for member in pool._members))
            assert await say(pool) == "hello"
            assert len(favourite.asked) == 2

    asyncio.run(talk())


def test_one_that_says_it_is_well_and_fails_all_the_same_is_let_back_later_and_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ejections: list[int] = []

    def backoff_s(num_ejections: int) -> float:
        ejections.append(num_ejections)
        return 0.0

    monkeypatch.setattr(module, "backoff_s", backoff_s)
    monkeypatch.setattr(module, "CHECK_S", 0.01)

    async def talk() -> None:
        engines = {"http://a": Remote(fails_at=0)}
        async with pooling(engines) as pool:
            for _ in range(3):
                await until(lambda: not pool._members[0].is_out)
                for _ in range(module.MAX_FAILURES):
                    with pytest.raises(EngineError, match="has died"):
                        await say(pool)
                assert pool._members[0].is_out
            assert ejections == [0, 1, 2]

    asyncio.run(talk())


def test_one_that_is_away_at_first_joins_and_the_pool_can_what_all_can(impatient: None) -> None:
    async def talk() -> None:
        engines = {"http://a": Remote(able=("seed", "top_k")), "http://b": Remote(able=("seed",))}
        engines["http://b"].is_well = False
        engines["http://b"].context_tokens = 500
        async with pooling(engines) as pool:
            assert (pool.context_tokens, len(pool.capabilities)) == (1000, 2)
            engines["http://b"].is_well = True
            await until(lambda: len(pool._engines) == 2)
            assert (pool.context_tokens, pool.capabilities) == (500, {"seed"})
        assert all(engine.is_closed for engine in engines.values())
        for engine in engines.values():
            engine.is_well = False
        with pytest.raises(EngineError, match="http://a does not answer"):
            async with pooling(engines):
                pass

    asyncio.run(talk())


def test_what_an_engine_may_be_called() -> None:
    assert choose_engine("llamacpp").kind == "llamacpp"
    assert choose_engine("vllm").kind == "vllm"
    assert choose_engine("auto", is_gguf=True).kind == "llamacpp"
    found = choose_engine("http://a:1/v1, https://b/base/,http://a:1")
    assert (found.kind, found.urls) == ("elsewhere", ("http://a:1", "https://b/base"))
    with pytest.raises(EngineError, match="vLLM does not load GGUF files"):
        choose_engine("vllm", is_gguf=True)
    with pytest.raises(EngineError, match="engine 'steam' is unknown"):
        choose_engine("steam")
    with pytest.raises(EngineError, match="PIPELINE_ENGINE_KEY") as caught:
        choose_engine("http://me:secret@a")
    assert "secret" not in str(caught.value)


def test_the_dialect_of_a_url_is_asked_with_the_key() -> None:
    asked: list[tuple[str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append((request.path, request.headers.get("Authorization", "")))
        return web.json_response({"default_generation_settings": {"n_ctx": 77}})

    async def talk() -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        engine = await connect(f"http://{host}:{port}", "s3cret")
        assert isinstance(engine, LlamaCpp)
        assert engine.context_tokens == 77
        await engine.close()
        await runner.cleanup()

    asyncio.run(talk())
    assert set(asked) == {("/props", "Bearer s3cret")}


def test_of_two_llamacpp_servers_one_may_be_killed_and_come_back(
    tiny_gguf: Path, impatient: None
) -> None:
    chat = Chat(tiny_gguf.parent)
    hello = chat.prompt_ids([{"role": "user", "content": "Hello"}], None, "direct")

    async def talk(processes: dict[str, subprocess.Popen[str]], again: ExitStack) -> None:
        pool = await Pool.at(list(processes), partial(connect, api_key=""))
        first = await say(pool, hello)
        favourite = pool._choose(hello, PLAIN)
        processes[favourite.url].kill()
        processes[favourite.url].wait()

        assert await say(pool, hello) == first, "the other answers at once"
        await until(lambda: favourite.is_out)
        assert pool._choose(hello, PLAIN) is not favourite
        assert await say(pool, hello) == first

        port = int(favourite.url.rpartition(":")[2])
        await asyncio.to_thread(again.enter_context, llamacpp_at(port, tiny_gguf))
        await until(lambda: not favourite.is_out)
        assert pool._choose(hello, PLAIN) is favourite
        assert await say(pool, hello) == first
        await pool.close()

    with ExitStack() as stack:
        ports = [free_port(), free_port()]
        processes = {
            f"http://127.0.0.1:{port}": stack.enter_context(llamacpp_at(port, tiny_gguf))
            for port in ports
        }
        asyncio.run(talk(processes, stack))
