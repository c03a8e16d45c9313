"""The engine over llama.cpp: against a fake of its dialect, and against the real one."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pipeline.chat import Chat
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.protocol import PLAIN, Delta, Lane, Sampling, StopToken
from pipeline.errors import EngineError
from pipeline.serve.asking.grammar import Function, Tags, either, json_object, tool_calls

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
GREEDY = Sampling(max_tokens=12, temperature=0.0)


@asynccontextmanager
async def fake(answer: Answer) -> AsyncIterator[LlamaCpp]:
    """An engine at a URL whose /completion is `answer`."""

    async def props(_: web.Request) -> web.Response:
        return web.json_response({"default_generation_settings": {"n_ctx": 64}})

    app = web.Application()
    app.add_routes([web.get("/props", props), web.post("/completion", answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        async with await LlamaCpp.at(f"http://{host}:{port}/") as engine:
            yield engine
    finally:
        await runner.cleanup()


async def gather(
    engine: LlamaCpp, prompt_ids: list[int], sampling: Sampling, lane: Lane = PLAIN
) -> list[Delta]:
    return [delta async for delta in engine.generate(prompt_ids, sampling, lane)]


def streamed(*parts: bytes) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.01)
        return response

    return answer


def event(text: str, num_tokens: int, **others: Any) -> bytes:
    value = {"content": text, "stop": False, "tokens_predicted": num_tokens, "tokens_evaluated": 2}
    return b"data: " + web.json_response(value | others).body + b"\n\n"  # type: ignore[operator]


def test_events_become_deltas_however_the_connection_cuts_them() -> None:
    last = event("", 4, stop=True, stop_type="eos", timings={"cache_n": 1})
    whole = event("Ä", 2) + b": a comment\n\n" + event("b", 3) + last

    async def check() -> None:
        async with fake(streamed(whole[:40], whole[40:41], whole[41:])) as engine:
            assert engine.context_tokens == 64
            deltas = await gather(engine, [5, 6], GREEDY)
        assert [(delta.text, delta.num_tokens) for delta in deltas] == [("Ä", 2), ("b", 1), ("", 1)]
        assert deltas[-1] == Delta("", 1, "stop", 2, 1, 4)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (streamed(event("a", 1)), "ended its answer too early"),
        (streamed(b'error: {"error": {"message": "out of memory"}}\n\n'), "out of memory"),
        (streamed(b"data: nonsense\n\n"), "not a JSON object"),
        (streamed(b'data: {"content": "a"}\n\n'), "not a completion"),
    ],
)
def test_a_broken_answer_is_one_sentence(answer: Answer, words: str) -> None:
    async def check() -> None:
        async with fake(answer) as engine:
            with pytest.raises(EngineError, match=words):
                await gather(engine, [5], GREEDY)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("body", "words"),
    [(b"<html>", "not a JSON object"), (b"[]", "not a JSON object"), (b"{}", "no log-prob")],
)
def test_broken_log_probabilities_are_one_sentence(body: bytes, words: str) -> None:
    async def check() -> None:
        async with fake(streamed(body)) as engine:
            with pytest.raises(EngineError, match=words):
                await engine.next_token_logprobs([5], 3)

    asyncio.run(check())


def test_a_refusal_and_a_dropped_connection_are_one_sentence() -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "too long"}}, status=400)

    async def drop(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def check() -> None:
        async with fake(refuse) as engine:
            with pytest.raises(EngineError, match=r"too long \(400\)"):
                await gather(engine, [5], GREEDY)
        async with fake(drop) as engine:
            with pytest.raises(EngineError, match="does not answer"):
                await gather(engine, [5], GREEDY)

    asyncio.run(check())


def test_every_sampling_parameter_is_sent() -> None:
    asked: list[dict[str, Any]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(await request.json())
        return await streamed(event("", 1, stop=True, stop_type="limit"))(request)

    async def check() -> None:
        async with fake(answer) as engine:
            sampling = Sampling(9, 0.5, 0.9, 20, 0.1, 0.2, 0.3, 1.1, seed=-1, logit_bias={4: -2.5})
            deltas = await gather(engine, [5], sampling)
        assert deltas[-1].finish == "length"

    asyncio.run(check())
    sent = asked[0]
    assert (sent["n_predict"], sent["temperature"], sent["top_p"]) == (9, 0.5, 0.9)
    assert (sent["top_k"], sent["min_p"], sent["repeat_penalty"]) == (20, 0.1, 1.1)
    assert (sent["frequency_penalty"], sent["presence_penalty"]) == (0.2, 0.3)
    assert 0 <= sent["seed"] < 2**32 - 1
    assert sent["logit_bias"] == [[4, -2.5]]


def test_what_may_end_a_reply_is_no_part_of_its_text() -> None:
    stops = (StopToken(9, "</x>"),)
    begun = event("a", 1, tokens=[1]) + event("", 2, tokens=[2])
    for end, ids, stop_id in (
        (event("<b", 3, tokens=[3]) + event("", 3, stop=True, stop_type="limit"), (1, 2, 3), None),
        (event("", 2, stop=True, stop_type="limit"), (1, 2), None),
        (event("", 2, stop=True, stop_type="eos"), (1,), None),
        (event("", 2, stop=True, stop_type="word", stopping_word="</x>"), (1,), 9),
    ):

        async def check(whole: bytes = begun + end) -> list[Delta]:
            async with fake(streamed(whole)) as engine:
                return await gather(engine, [5], replace(GREEDY, stop_tokens=stops))

        deltas = asyncio.run(check())
        assert tuple(token for delta in deltas for token in delta.ids) == ids
        assert deltas[-1].stop_id == stop_id


def test_nobody_at_the_address_is_one_sentence() -> None:
    with pytest.raises(EngineError, match="does not answer"):
        asyncio.run(LlamaCpp.at("http://127.0.0.1:9"))


def test_a_missing_or_broken_file_is_one_sentence(tmp_path: Path) -> None:
    async def start(gguf: Path) -> None:
        await LlamaCpp.start(gguf, slots=1, context_tokens=64, log=tmp_path / "log")

    with pytest.raises(EngineError, match="is missing"):
        asyncio.run(start(tmp_path / "none.gguf"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    (tmp_path / "log").write_text("of an older child")
    with pytest.raises(EngineError, match="did not start"):
        asyncio.run(start(broken))
    assert "older child" not in (tmp_path / "log").read_text()
    assert "broken.gguf" in (tmp_path / "log").read_text()


def test_the_real_engine(tiny_gguf: Path, tmp_path: Path) -> None:
    """One start for everything that is asked of the real one."""
    chat = Chat(tiny_gguf.parent)

    async def check() -> None:
        async with await LlamaCpp.start(
            tiny_gguf, slots=2, context_tokens=256, log=tmp_path / "log"
        ) as engine:
            assert engine.context_tokens == 256
            assert await engine.is_healthy()
            await _counts_and_repeats(engine, chat)
            await _gives_logprobs(engine, chat)
            await _is_cancelled_by_closing(engine)
            with pytest.raises(EngineError, match="context size"):
                await gather(engine, [5] * 300, GREEDY)
            child = engine.connection.child
            assert child is not None
            pid = child.process.pid
            assert not engine.has_failed
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(EngineError, match="see "):
                await gather(engine, [5], GREEDY)
            assert engine.has_failed
        assert not Path(f"/proc/{pid}").exists()

    asyncio.run(check())


async def _counts_and_repeats(engine: LlamaCpp, chat: Chat) -> None:
    prompt_ids = chat.encode("Hello, world")
    first, second = [await gather(engine, prompt_ids, GREEDY) for _ in range(2)]
    assert "".join(d.text for d in first) == "".join(d.text for d in second)
    assert first[-1].num_prompt_tokens == len(prompt_ids)
    assert second[-1].num_cached_tokens == len(prompt_ids) - 1
    assert sum(d.num_tokens for d in first) == first[-1].num_completion_tokens <= 12
    salts = ["one", "one", "other", "other", "third"]
    salted = [await gather(engine, prompt_ids, GREEDY, Lane(cache_salt=salt)) for salt in salts]
    cached = len(prompt_ids) - 1
    assert [s[-1].num_cached_tokens for s in salted] == [0, cached, 0, cached, 0]
    assert {"".join(d.text for d in s) for s in salted} == {"".join(d.text for d in first)}
    seeded = [await gather(engine, prompt_ids, Sampling(12, seed=7)) for _ in range(2)]
    assert seeded[0][-1].finish == seeded[1][-1].finish
    assert "".join(d.text for d in seeded[0]) == "".join(d.text for d in seeded[1])


async def _gives_logprobs(engine: LlamaCpp, chat: Chat) -> None:
    logprobs = await engine.next_token_logprobs(chat.encode("Hello"), 5)
    assert len(logprobs) == 5
    assert all(value < 0 for value in logprobs.values())
    assert sorted(logprobs.values(), reverse=True) == list(logprobs.values())


async def _is_cancelled_by_closing(engine: LlamaCpp) -> None:
    async def is_idle() -> bool:
        async with engine.connection._session.get("http://llama.cpp/slots") as response:
            return not any(slot["is_processing"] for slot in await response.json())

    endless = Sampling(max_tokens=200, temperature=2.0)
    async with aclosing(engine.generate([5, 6, 7], endless)) as deltas:
        await anext(deltas)
    begin = time.monotonic()
    while not await is_idle():
        assert time.monotonic() - begin < 1
        await asyncio.sleep(0.01)


# Of every kind of schema, one; each is taken as a tool's by pipeline.serve.asking.grammar.
SCHEMAS: list[dict[str, Any]] = [
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uri"},
    {"type": "string", "format": "int64"},
    {"type": "string", "pattern": "^[a-z]+$", "maxLength": 9},
    {"type": "string", "pattern": "(?=a)b"},
    {"type": "integer", "minimum": 10**300},
    {"type": "number", "exclusiveMinimum": 0, "multipleOf": 0.01},
    {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    {"type": "array", "prefixItems": [{}], "maxItems": 10**9},
    {"oneOf": [{"type": "string"}, {"maxLength": 3}]},
    {"allOf": [{"type": "object"}, {"required": ["a"]}]},
    {"not": {}, "if": {}, "then": {}},
    {"enum": ["ä", "\u2028", {"x": 1}], "default": None, "x-mine": 1},
    {"type": "object", "patternProperties": {"^a": {}}, "minProperties": 1},
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
]


def test_llama_cpp_takes_every_grammar_we_take(tiny_gguf: Path, chat: Chat, tmp_path: Path) -> None:
    """What its llguidance refuses it passes over in silence, but for its log."""
    tags = Tags.of(chat)

    def grammar(schema: dict[str, Any]) -> str:
        function = Function('näm"e', {"properties": {"a": schema}}, "here")
        calls = tool_calls([function], tags, parallel=True)
        return either(json_object(), calls, tags).text

    async def session(grammars: list[str]) -> str:
        async with await LlamaCpp.start(
            tiny_gguf, slots=1, context_tokens=256, log=tmp_path / "log"
        ) as engine:
            for text in grammars:
                await gather(engine, [5], Sampling(8, temperature=0.0, grammar=text))
        return (tmp_path / "log").read_text()

    grammars = [grammar(schema) for schema in SCHEMAS]
    assert "llg error" not in asyncio.run(session(grammars))
    refused = grammars[0].replace("date-time", "no-format").replace('"lenient": true', '"x": 1')
    assert "llg error" in asyncio.run(session([refused])), "this is how it would be seen"


ORPHAN = """
import asyncio, sys
from pathlib import Path
from pipeline.engine.llamacpp import LlamaCpp

async def main():
    log = Path(sys.argv[2])
    engine = await LlamaCpp.start(Path(sys.argv[1]), slots=1, context_tokens=64, log=log)
    child = engine.connection.child
    sys.stdout.write(f"{child.process.pid} {child.folder}\\n")
    sys.stdout.flush()
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_no_orphan_is_left_when_we_are_killed(tiny_gguf: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, str(tiny_gguf), str(tmp_path / "log")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        assert Path(f"/proc/{pid}").exists()
        parent.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    while Path(f"/proc/{pid}").exists() or Path(folder).exists():
        assert time.monotonic() - begin < 5
        time.sleep(0.05)
