"""The engine over vLLM without vLLM: against a fake of its dialect, and its child's guard."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web

from pipeline.engine import vllm_child, vllm_launch
from pipeline.engine.protocol import PLAIN, Delta, Lane, Sampling, StopToken, TokenLogprob
from pipeline.engine.vllm import Vllm
from pipeline.engine.vllm_launch import end_ids, launch_words, why_gone
from pipeline.errors import EngineError, EngineRefused

GREEDY = Sampling(max_tokens=12, temperature=0.0)
CARD = {"id": "base", "owned_by": "vllm", "max_model_len": 64, "parent": None}


class Fake:
    """Answers a completion with events, or with a status; keeps what it was asked."""

    def __init__(self, *parts: bytes, cards: Any = (CARD,), status: int = 200) -> None:
        self.parts = parts
        self.cards = cards
        self.status = status
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()

    async def models(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers.get("Authorization"))
        if self.cards is None:
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"object": "list", "data": list(self.cards)})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        response = web.StreamResponse(status=self.status)
        await response.prepare(request)
        for part in self.parts:
            await response.write(part)
            await asyncio.sleep(0.01)
        return response

    @asynccontextmanager
    async def engine(self, **more: str) -> AsyncIterator[Vllm]:
        app = web.Application()
        app.add_routes([web.get("/v1/models", self.models)])
        app.add_routes([web.post("/v1/completions", self.complete)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        try:
            async with await Vllm.at(f"http://{host}:{port}/", **more) as engine:
                yield engine
        finally:
            await runner.cleanup()

    def say(
        self, sampling: Sampling = GREEDY, lane: Lane = PLAIN, **more: str
    ) -> tuple[list[Delta], Vllm]:
        async def collect() -> tuple[list[Delta], Vllm]:
            async with self.engine(**more) as engine:
                return [delta async for delta in engine.generate([5, 6], sampling, lane)], engine

        return asyncio.run(collect())


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(text: str, ids: list[int], num: int, **more: Any) -> bytes:
    usage = {"prompt_tokens": 2, "completion_tokens": num}
    choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": None} | more
    return event({"choices": [choice], "usage": usage})


def counts(num: int, num_cached: int) -> bytes:
    details = {"cached_tokens": num_cached}
    usage = {"prompt_tokens": 2, "completion_tokens": num, "prompt_tokens_details": details}
    return event({"choices": [], "usage": usage})


def places(*found: tuple[int, float, dict[int, float]]) -> dict[str, Any]:
    return {
        "tokens": [f"token_id:{id}" for id, _, _ in found],
        "token_logprobs": [logprob for _, logprob, _ in found],
        "top_logprobs": [{f"token_id:{id}": lp for id, lp in top.items()} for _, _, top in found],
    }


END = chunk("", [151645], 4, finish_reason="stop") + counts(4, 1) + b"data: [DONE]\n\n"


def test_events_become_deltas_however_the_connection_cuts_them() -> None:
    whole = chunk("Ä", [7, 8], 2) + b": keep-alive\n\n" + chunk("b", [9], 3) + END
    deltas, engine = Fake(whole[:30], whole[30:31], whole[31:]).say()
    assert deltas == [
        Delta("Ä", 2, None, 2, 0, 2, (7, 8)),
        Delta("b", 1, None, 2, 0, 3, (9,)),
        Delta("", 1, "stop", 2, 1, 4),
    ]
    assert engine.context_tokens == 64


def test_what_ended_it_is_counted_and_named_but_not_among_ids_and_logprobs() -> None:
    logprobs = places((7, -0.5, {7: -0.5, 8: -1.0}), (9, -3.0, {9: -3.0, 8: -0.1, 7: -0.2}))
    last = chunk("a", [7, 9], 2, finish_reason="stop", stop_reason=9, logprobs=logprobs)
    stops = (StopToken(9, "</think>"),)
    sampling = Sampling(12, temperature=0.0, top_logprobs=2, stop_tokens=stops)
    (delta,), _ = Fake(last + counts(2, 0)).say(sampling)
    assert (delta.ids, delta.num_tokens, delta.stop_id) == ((7,), 2, 9)
    assert delta.logprobs == (TokenLogprob(7, -0.5, ((7, -0.5), (8, -1.0))),)
    (cut,), _ = Fake(chunk("a", [7, 9], 2, finish_reason="length", logprobs=logprobs)).say(sampling)
    assert (cut.ids, cut.finish, cut.stop_id) == ((7, 9), "length", None)
    assert cut.logprobs[1] == TokenLogprob(9, -3.0, ((8, -0.1), (7, -0.2)))


def test_a_server_without_ids_or_running_counts_is_counted_in_the_end() -> None:
    def plain(text: str, finish: str | None) -> bytes:
        return event({"choices": [{"text": text, "finish_reason": finish}]})

    usage = event({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 9}})
    deltas, _ = Fake(plain("a", None), plain("b", "stop"), usage).say()
    assert [delta.num_tokens for delta in deltas] == [1, 8]
    assert deltas[-1] == Delta("b", 8, "stop", 2, 0, 9)


def test_every_parameter_is_sent() -> None:
    fake = Fake(END)
    plain = fake.say()[0] and fake.asked.pop()
    assert {"temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty"} < plain.keys()
    assert (plain["model"], plain["prompt"], plain["seed"]) == ("base", [5, 6], None)
    assert not {"priority", "cache_salt", "structured_outputs"} & plain.keys()
    sampling = Sampling(
        12,
        top_p=0.0,
        seed=-1,
        logit_bias={7: -1.5},
        stop_tokens=(StopToken(9, "</think>"),),
        grammar='start: "a"',
        top_logprobs=3,
    )
    fake.say(sampling, Lane("tenant/one", -2, "salt"))
    asked = fake.asked.pop()
    assert 0 < asked["top_p"] < 1e-3
    assert asked["seed"] == 2**63 - 1
    assert (asked["logit_bias"], asked["stop_token_ids"]) == ({"7": -1.5}, [9])
    assert asked["structured_outputs"] == {"grammar": '%llguidance {}\nstart: "a"'}
    assert (asked["logprobs"], asked["model"]) == (3, "tenant/one")
    assert (asked["priority"], asked["cache_salt"]) == (-2, "salt")
    fake.say(Sampling(12, is_repeatable=True), Lane(cache_salt="salt"))
    assert fake.asked.pop()["cache_salt"] != "salt"


@pytest.mark.parametrize(
    ("parts", "status", "kind", "said"),
    [
        ([event({"error": {"message": "no\nsuch", "code": 400}})], 200, EngineRefused, "no$"),
        ([event({"error": {"message": "boom", "code": 500}})], 200, EngineError, "failed: boom"),
        ([b'{"error": {"message": "too long"}}'], 400, EngineRefused, "too long"),
        ([b'{"error": "Unauthorized"}'], 401, EngineError, "Unauthorized"),
        ([chunk("a", [7], 1)], 200, EngineError, "too early"),
        ([event({"choices": [{}]})], 200, EngineError, "not a completion"),
        ([chunk("a", [7], 1, finish_reason="abort")], 200, EngineError, "not a completion"),
    ],
)
def test_failures_are_one_sentence(
    parts: list[bytes], status: int, kind: type[EngineError], said: str
) -> None:
    with pytest.raises(EngineError, match=said) as caught:
        Fake(*parts, status=status).say()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_a_url_says_its_model_context_and_what_acts() -> None:
    adapter = CARD | {"id": "adapter", "parent": "base", "max_model_len": None}
    second = CARD | {"id": "second", "max_model_len": 128}
    fake = Fake(END, cards=[adapter, CARD, second])
    _, engine = fake.say(api_key="secret")
    assert (engine.context_tokens, fake.asked.pop()["model"]) == (64, "base")
    assert fake.keys == {"Bearer secret"}
    assert engine.capabilities >= {"grammar", "logprobs", "adapters", "seed"}
    assert "priority" not in engine.capabilities
    _, engine = fake.say(model="second")
    assert (engine.context_tokens, fake.asked.pop()["model"]) == (128, "second")
    _, engine = Fake(END, cards=[CARD | {"owned_by": "sglang"}]).say()
    assert engine.capabilities >= {"top_k", "logit_bias"}
    assert not engine.capabilities & {"grammar", "logprobs", "adapters", "seed", "cache_salt"}


@pytest.mark.parametrize(
    ("cards", "model", "said"),
    [
        (None, "", "Unauthorized"),
        ([], "", "a model with max_model_len"),
        ([{"id": "base"}], "", "a model with max_model_len"),
        ([CARD], "other", "model other with max_model_len"),
    ],
)
def test_a_url_without_a_usable_model_is_refused(cards: Any, model: str, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        Fake(END, cards=cards).say(model=model)


def test_the_launch_fits_the_checkpoint_and_its_adapters(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no checkpoint"):
        launch_words(tmp_path, 4, 1000, {})
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 500, "eos_token_id": 3}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    words = launch_words(tmp_path, 4, 1000, {})
    assert words[words.index("--max-model-len") + 1] == "500"
    assert "--enable-lora" not in words
    assert "--max-model-len" not in launch_words(tmp_path, 4, None, {})
    assert end_ids(tmp_path) == (2, 3)
    with pytest.raises(EngineError, match="no LoRA adapter"):
        launch_words(tmp_path, 4, None, {"a/one": tmp_path})
    config = {"r": 8, "rank_pattern": {"q_proj": 40}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    words = launch_words(tmp_path, 4, None, {"a/one": tmp_path})
    assert words[words.index("--max-lora-rank") + 1] == "64"
    assert json.loads(words[-1]) == {"name": "a/one", "path": str(tmp_path.resolve())}


def test_without_vllm_the_way_to_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_launch, "ENVIRONMENT", tmp_path)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 500}')
    with pytest.raises(EngineError, match="make engine-vllm"):
        asyncio.run(Vllm.start(tmp_path, slots=1, context_tokens=None, log=tmp_path / "log"))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            "(APIServer pid=7) WARNING [a.py:1] errors like `OSError: many`\n"
            "(Worker pid=9) ERROR 11-26 [b.py:95] RuntimeError: No weights in `x`. See y.\n"
            "RuntimeError: Engine core initialization failed.\n",
            ": No weights in `x`;",
        ),
        (
            "pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, it is (9) too long [type=value_error]\n",
            ": it is (9) too long;",
        ),
        ("nothing of use", "did not start; see"),
    ],
)
def test_the_reason_is_found_in_the_log(tmp_path: Path, said: str, why: str) -> None:
    log = tmp_path / "log"
    log.write_text(said)
    assert why in why_gone(log)
    assert why_gone(log).endswith(f"; see {log}")


# Stands for vLLM: a main process and a worker, both deaf to SIGTERM, which say who they are.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"])
print(worker.pid, *sys.argv[1:], flush=True)
time.sleep(60)
"""


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("end", ["input ends", "main is killed", "both"])
def test_the_guard_leaves_no_process_and_no_socket(tmp_path: Path, end: str) -> None:
    package = tmp_path / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text(STUBBORN)
    socket = tmp_path / "socket" / "engine.sock"
    socket.parent.mkdir()
    process = subprocess.Popen(
        [sys.executable, vllm_child.__file__, str(socket), "model", "--flag"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    worker, *words = process.stdout.readline().decode().split()
    assert words == ["serve", "model", "--flag", "--uds", str(socket)]
    assert lives(int(worker))
    if end != "main is killed":
        process.stdin.close()
    if end != "input ends":
        os.kill(process.pid, signal.SIGKILL)
    _wait_until(lambda: not lives(int(worker)) and not socket.parent.exists())
    assert process.wait(10) == -signal.SIGKILL
    process.stdin.close()
    process.stdout.close()


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_requests_that_follow_one_another_share_a_connection() -> None:
    fake, peers = Fake(END), set()

    async def complete(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        return await Fake.complete(fake, request)

    fake.complete = complete  # type: ignore[method-assign]

    async def ask_twice() -> None:
        async with fake.engine() as engine:
            for _ in range(2):
                _ = [delta async for delta in engine.generate([5, 6], GREEDY)]
                await asyncio.sleep(0.05)

    asyncio.run(ask_twice())
    assert len(fake.asked) == 2
    assert len(peers) == 1
