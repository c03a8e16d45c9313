"""What a server offers changes while it runs: no stream is cut, and no failure changes anything."""

import asyncio
import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import Refused, Server, chunks
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.errors import EngineDown, EngineError, GateMissed, PipelineError
from pipeline.serve.control import ask_to_reload, obeying, socket_of
from pipeline.serve.offer import offering as offering_module
from pipeline.serve.offer.catalog import Catalog
from pipeline.serve.offer.engines import EngineSetup
from pipeline.serve.offer.fleet import Fleet
from pipeline.serve.offer.offering import Offering
from pipeline.serve.settings import Settings, read_target

A, B = "{slug: me/a, gguf: a/a.gguf}", "{slug: me/b, gguf: b/b.gguf}"


class Place:
    """A server without HTTP: what it offers, and the engines that were started for it."""

    def __init__(self) -> None:
        self.catalog = Catalog([])
        self.started: list[tuple[EngineSetup, ScriptedEngine]] = []
        self.requests: set[asyncio.Task[None]] = set()
        self.fleet = Fleet(self._start)
        path = Path("serve.yaml")
        read = functools.partial(read_target, path, Settings(engine="auto"))
        self.offering = Offering(path, read, self.catalog, self.fleet, self._requests)

    async def _requests(self) -> set[asyncio.Task[None]]:
        return self.requests

    @property
    def slugs(self) -> list[str]:
        return [served.slug for served in self.catalog.models]

    @property
    def engines(self) -> list[ScriptedEngine]:
        return [engine for _, engine in self.started]

    @property
    def open(self) -> list[bool]:
        return [not engine.is_closed for engine in self.engines]

    async def _start(self, setup: EngineSetup, chat: asyncio.Future[Chat]) -> ScriptedEngine:
        await chat
        assert setup.load is not None
        if setup.load.weights.read_text() == "broken":
            raise EngineError(f"llama.cpp did not load {setup.load.weights}")
        self.started.append((setup, ScriptedEngine()))
        return self.engines[-1]


def offer(*models: str, more: str = "") -> None:
    listed = "".join(f"  - {model}\n" for model in models)
    Path("serve.yaml").write_text(f"models:\n{listed}{more}", encoding="utf-8")


@contextlib.asynccontextmanager
async def begun(*models: str) -> AsyncIterator[Place]:
    offer(*models)
    place = Place()
    async with place.fleet:
        await place.offering.begin()
        yield place


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with `a/a.gguf`, `b/b.gguf`, `lora.gguf`, and a state folder."""
    for name in ("a", "b"):
        shutil.copytree(chat_folder, tmp_path / name)
        (tmp_path / name / f"{name}.gguf").write_text(name)
    (tmp_path / "lora.gguf").write_text("lora")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def run(test: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_models_of_the_same_weights_share_an_engine_and_a_dialogue() -> None:
    async def test() -> None:
        adapters = "adapters: {me/x: lora.gguf, me/y: lora.gguf}, variants: {free: {}}"
        first = f"{A[:-1]}, {adapters}}}"
        async with begun(first, B) as place:
            assert place.slugs == ["me/a", "me/a:free", "me/x", "me/y", "me/b"]
            models = {served.slug: served for served in place.catalog.models}
            assert len(place.started) == 2
            assert len({id(served.engine) for served in models.values()}) == 2
            assert models["me/a:free"].engine is models["me/y"].engine is models["me/a"].engine
            assert models["me/b"].chat is models["me/a"].chat, "one tokenizer is read once"
            load = place.started[0][0].load
            assert load is not None
            assert list(load.adapters) == ["me/x", "me/y"]
        assert place.open == [False, False]

    run(test)


def test_equal_entries_share_an_engine_too() -> None:
    async def test() -> None:
        async with begun(A, "{slug: me/again, gguf: a/a.gguf}") as place:
            assert len(place.started) == 1

    run(test)


def test_the_default_is_the_first() -> None:
    async def test() -> None:
        async with begun(A, B) as place:
            offer(A, B, more="default: me/b")
            await place.offering.reload()
            assert place.catalog.find(None).slug == "me/b"

    run(test)


def test_a_model_that_is_added_is_started_and_the_others_stay() -> None:
    async def test() -> None:
        async with begun(A) as place:
            kept = place.catalog.models[0]
            offer(A, B, more="presets: {brief: {temperature: 0}}")

            assert await place.offering.reload() == "me/a, me/b on offer; new: me/b"

            assert place.slugs == ["me/a", "me/b"]
            assert place.catalog.models[0].engine is kept.engine
            assert place.catalog.models[0].door is kept.door
            assert place.catalog.presets == {"brief": {"temperature": 0}}
            assert len(place.started) == 2
            assert place.open == [True, True]

    run(test)


def test_other_terms_need_no_other_engine() -> None:
    async def test() -> None:
        async with begun(A) as place:
            offer(f'{A[:-1]}, title: T, queue: 2, price: {{prompt: "0.000001"}}}}')
            await place.offering.reload()
            [served] = place.catalog.models
            assert (served.title, served.price.prompt, served.door.max_inside) == ("T", 10**6, 6)
            assert len(place.started) == 1

    run(test)


def test_a_model_that_is_removed_is_let_go_when_its_requests_have_ended() -> None:
    async def test() -> None:
        async with begun(A, B) as place:
            ended = asyncio.Event()

            async def request() -> None:
                await ended.wait()

            running = asyncio.create_task(request())
            place.requests.add(running)
            offer(B)
            assert await place.offering.reload() == "me/b on offer; gone: me/a"
            assert place.slugs == ["me/b"]
            place.requests.add(asyncio.create_task(asyncio.sleep(60)))  # it began afterwards
            await asyncio.sleep(0.05)
            assert place.open == [True, True]

            ended.set()
            while place.open[0]:
                await asyncio.sleep(0.01)
            assert place.open == [False, True]

    run(test)


def test_a_server_that_stops_closes_also_what_still_leaves() -> None:
    async def test() -> None:
        async with begun(A, B) as place:
            place.requests.add(asyncio.create_task(asyncio.sleep(60)))
            offer(B)
            await place.offering.reload()
            assert place.open == [True, True]
        assert place.open == [False, False]

    run(test)


def test_weights_and_a_dialogue_that_were_written_anew_are_taken_up(weights: Path) -> None:
    async def test() -> None:
        async with begun(A, B) as place:
            old = place.catalog.models[0]
            (weights / "a" / "a.gguf").write_text("trained further")
            template = weights / "b" / "chat_template.jinja"
            template.write_text(template.read_text() + "{# new #}")

            await place.offering.reload()

            first, second = place.catalog.models
            assert first.engine is not old.engine
            assert first.chat is old.chat
            assert second.chat is not old.chat
            assert len(place.started) == 3
            while place.open[0]:
                await asyncio.sleep(0.01)
            assert place.open == [False, True, True]

    run(test)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [", "is not YAML"),
        ("models: []", "is not a valid serve file"),
        (f"models: [{B}, {{gguf: none.gguf}}]", "none.gguf does not exist"),
        (f"models: [{B}, {{gguf: broken/broken.gguf}}]", "did not load broken/broken.gguf"),
        (f"models: [{B}, {{gguf: no-tokenizer/x.gguf}}]", "is not a tokenizer"),
    ],
)
def test_a_failure_changes_nothing(
    weights: Path, text: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("broken", "no-tokenizer"):
        shutil.copytree(weights / "a", weights / name)
    (weights / "broken" / "broken.gguf").write_text("broken")
    (weights / "no-tokenizer" / "tokenizer.json").write_text("{}")
    (weights / "no-tokenizer" / "x.gguf").write_text("x")

    async def test() -> None:
        async with begun(A) as place:
            [served] = place.catalog.models
            Path("serve.yaml").write_text(text)
            with pytest.raises(PipelineError, match=said):
                await place.offering.reload()
            assert place.catalog.models == [served]
            assert place.open == [True] + [False] * (len(place.started) - 1)

            offer(A, B)
            await place.offering.reload()
            assert place.slugs == ["me/a", "me/b"]
            assert served.engine is place.catalog.models[0].engine

    run(test)
    assert said in caplog.text


def test_what_nobody_has_thought_of_changes_nothing_either(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with begun(A) as place:
            offer(B)
            place.offering._read = lambda: 1 / 0  # type: ignore[assignment,return-value]
            with pytest.raises(PipelineError, match="not reloaded: ZeroDivisionError"):
                await place.offering.reload()
            assert place.slugs == ["me/a"]

    run(test)
    assert "Traceback" in caplog.text


def test_nothing_is_reloaded_while_the_server_stops() -> None:
    async def test() -> None:
        async with begun(A) as place:
            place.catalog.is_draining = True
            with pytest.raises(EngineDown, match="about to stop"):
                await place.offering.reload()

    run(test)


def test_a_file_that_changes_is_taken_up_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(offering_module, "CHECK_S", 0.01)
    caplog.set_level(logging.INFO)

    async def test() -> None:
        async with begun(A) as place:
            watching = asyncio.create_task(place.offering.watch())
            Path("serve.yaml").write_text("models: [")
            while "not reloaded" not in caplog.text:
                await asyncio.sleep(0.01)
            Path("serve.yaml").unlink()
            await asyncio.sleep(0.05)
            offer(A, B)
            while "reloaded: me/a, me/b on offer; new: me/b" not in caplog.text:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert not watching.done()
            watching.cancel()

    run(test)
    assert caplog.text.count("reloaded") == 2


async def told(port: int | None) -> str:
    return await asyncio.to_thread(ask_to_reload, port)


def test_the_command_is_told_what_has_become_of_it() -> None:
    async def test() -> None:
        answers: list[Any] = ["a on offer", PipelineError("no"), GateMissed("not certified")]
        answers += ["first", "second"]

        async def reload() -> str:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return str(answer)

        async with obeying(8000, reload):
            assert stat.S_IMODE(socket_of(8000).stat().st_mode) == 0o600
            assert await told(None) == "a on offer"
            with pytest.raises(PipelineError, match="no") as refused:
                await told(8000)
            assert refused.value.exit_code == 2
            with pytest.raises(PipelineError, match="not certified") as refused:
                await told(8000)
            assert refused.value.exit_code == 3
            with pytest.raises(PipelineError, match="no server of yours runs at port 8001"):
                await told(8001)
            async with obeying(8001, reload):
                with pytest.raises(PipelineError, match="give --port 8000 or 8001"):
                    await told(None)
                assert [await told(port) for port in (8000, 8001)] == ["first", "second"]
        assert not socket_of(8000).exists()
        with pytest.raises(PipelineError, match="no server of yours runs: pipeline serve starts"):
            await told(None)

    run(test)


def test_a_socket_that_a_killed_server_left_is_no_server_and_in_nobodys_way() -> None:
    async def test() -> None:
        async def reload() -> str:
            return "fine"

        async with obeying(8000, reload):
            left = socket_of(8000).rename(socket_of(8001))
        assert left.is_socket()
        with pytest.raises(PipelineError, match="no server of yours runs"):
            await told(None)
        async with obeying(8001, reload):
            assert await told(8001) == "fine"

    run(test)


def test_where_no_socket_can_be_the_server_serves_all_the_same(
    weights: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(weights / ("long" * 40)))

    async def test() -> None:
        async def reload() -> str:
            return ""

        async with obeying(8000, reload):
            pass

    run(test)
    assert "pipeline reload cannot reach this server" in caplog.text


@pytest.fixture
def server(tiny_base: Path, tiny_adapter: Path) -> Iterator[Callable[[], tuple[Server, int]]]:
    """`pipeline serve serve.yaml` as a process; gives where it is, and its port."""
    Path("base").symlink_to(tiny_base)
    Path("tuned").symlink_to(tiny_adapter)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started: list[subprocess.Popen[str]] = []

    def start() -> tuple[Server, int]:
        command = [sys.executable, "-m", "pipeline", "serve", "serve.yaml", "--port", "0"]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        )
        out = started[-1].stdout
        assert out is not None
        key, url = out.readline().split()[1], out.readline().split()[-1]
        return Server(url, key), int(url.split(":")[2].partition("/")[0])

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 0


BASE = """{slug: me/base, checkpoint: base, engine: llamacpp, slots: 2, context: 4000,
     adapters: {me/tuned: tuned}, variants: {free: {max_tokens: 5}}}"""
OTHER = "{slug: me/other, checkpoint: base, engine: llamacpp, slots: 1, context: 3000}"


def listed(server: Server) -> list[str]:
    with urllib.request.urlopen(f"{server.url}/models", timeout=10) as response:
        return [model["id"] for model in json.load(response)["data"]]


@pytest.mark.slow
def test_a_real_server_changes_its_models_under_a_stream(server: Callable[[], Any]) -> None:
    offer(BASE, OTHER)
    asked, port = server()
    assert listed(asked) == ["me/base", "me/base:free", "me/tuned", "me/other"]
    hi = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    long = {**hi, "model": "me/other", "max_tokens": 2500, "stream": True}
    with asked.post(long) as response:
        stream = chunks(response)
        next(stream)
        offer(BASE, "{slug: me/new, checkpoint: base, engine: llamacpp, slots: 1, context: 500}")
        said = ask_to_reload(port)
        assert said.endswith("on offer; new: me/new; gone: me/other")
        assert listed(asked) == ["me/base", "me/base:free", "me/tuned", "me/new"]

        Path("serve.yaml").write_text("models: [{slug: me/broken, gguf: none.gguf}]")
        with pytest.raises(PipelineError, match=r"none\.gguf does not exist") as refused:
            ask_to_reload(port)
        assert refused.value.exit_code == 2

        hello = {**hi, "max_tokens": 16}
        models = ("me/base", "me/tuned", "me/new")
        replies = {model: asked.ask(**hello, model=model) for model in models}
        assert asked.ask(**hi, model="me/base:free").usage["completion_tokens"] == 5
        with pytest.raises(Refused, match="me/other is not a valid model ID"):
            asked.ask(**hi, model="me/other")
        *_, last = stream
    assert last["usage"]["completion_tokens"] == 2500, "the stream has not been cut"

    answers = {model: f"{reply.reasoning}{reply.answer}" for model, reply in replies.items()}
    assert answers["me/new"] == answers["me/base"] != answers["me/tuned"]

    offer(OTHER)  # and nobody says so
    while listed(asked) != ["me/other"]:
        time.sleep(0.1)
    assert asked.ask(**hi, max_tokens=4).usage["completion_tokens"] == 4


def test_a_mistake_of_the_command_is_one_sentence(pipeline: Any) -> None:
    said = pipeline("reload", "--port", "8001")

    assert said.code == 2
    assert said.err == ("error: no server of yours runs at port 8001: pipeline serve starts one\n")
