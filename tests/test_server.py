"""`pipeline serve` as a process: starts, answers, stops, leaves nothing behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest
from elsewhere import free_port, llamacpp_at
from scripted import ScriptedEngine

from pipeline.errors import BaseError, GateMissed, PipelineError
from pipeline.serve import ask as asking
from pipeline.serve.ask import ask_both_modes
from pipeline.serve.listening import listen
from pipeline.serve.offer.catalog import Served
from pipeline.serve.server import serve
from pipeline.serve.settings import Settings

SERVE = """
import json, sys
from pathlib import Path
from pipeline.serve.offer.engines import Room
from pipeline.serve.server import serve
from pipeline.serve.settings import Settings

def ready(url, key, models):
    sys.stdout.write(url + " " + key + "\\n")
    sys.stdout.flush()

more = json.loads(sys.argv[2])
room = Room(more.pop("slots", 1), more.pop("context_tokens", 512))
adapters = {name: Path(folder) for name, folder in more.pop("adapters", {}).items()}
settings = Settings(port=0, engine="llamacpp", room=room, adapters=adapters, **more)
serve(Path(sys.argv[1]), settings, ready)
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def process(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start `serve` with books, and a temporary folder for sockets and logs, of its own."""
    started: list[subprocess.Popen[str]] = []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TMPDIR": str(tmp_path),
    }

    def start(path: Path, **settings: Any) -> subprocess.Popen[str]:
        environment["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
        command = [sys.executable, "-c", SERVE, str(path), json.dumps(settings)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        )
        return started[-1]

    yield start
    for running in started:
        running.kill()
        running.communicate()


class Address(NamedTuple):
    """Where a server is, and a key to it."""

    url: str
    key: str


def address_of(running: subprocess.Popen[str]) -> Address:
    """Waits until it serves."""
    assert running.stdout is not None
    return Address(*running.stdout.readline().split())


def child_of(running: subprocess.Popen[str]) -> int:
    """Its engine's process."""
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text()
    [child] = children.split()
    return int(child)


def lives(process_id: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ask(base: Address, **more: Any) -> Any:
    """The open response to a question."""
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, **more}
    request = urllib.request.Request(
        f"{base.url}/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {base.key}"},
    )
    return urllib.request.urlopen(request, timeout=60)


def events(response: Any) -> Iterator[str]:
    """What a stream says, event by event."""
    for line in response:
        if line.startswith(b"data: "):
            yield line.removeprefix(b"data: ").decode().strip()


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Books that are not the user's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_taken_port_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("")
    (tmp_path / "x.gguf").write_text("")
    with taken_port() as port, pytest.raises(PipelineError, match="choose another port"):
        serve(tmp_path, Settings(port=port), lambda *_: None)
    with pytest.raises(BaseError, match="is not a tokenizer"):
        serve(tmp_path, Settings(port=0), lambda *_: None)


def test_a_port_is_taken_before_the_model_is_loaded() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with (
            pytest.raises(PipelineError, match="choose another port"),
            listen("127.0.0.1", port),
        ):
            pass
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            pass  # it waits, as the first is not ready


def test_an_engine_elsewhere_needs_no_gguf_file(chat_folder: Path, tiny_gguf: Path) -> None:
    models: list[dict[str, Any]] = []

    def look(url: str, key: str, _models: Sequence[Served]) -> None:
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=5) as response:
                models.extend(json.load(response)["data"])
            with ask(Address(url, key), max_tokens=4) as response:
                models[0]["answer"] = json.load(response)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PipelineError, match=r"has no \.gguf file: run `pipeline export` first"):
        serve(chat_folder, Settings(port=0, engine="llamacpp"), lambda *_: None)
    port = free_port()
    settings = Settings(port=0, engine=f"http://127.0.0.1:{port}/v1", model="me/mine")
    for option in ({"artefact": "merged"}, {"adapters": {"local/a": chat_folder}}):
        with pytest.raises(PipelineError, match="is not for http://127"):
            serve(chat_folder, replace(settings, **option), lambda *_: None)
    with llamacpp_at(port, tiny_gguf):
        serve(chat_folder, settings, lambda *address: Thread(target=look, args=address).start())

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    written = int((chat_folder / "tokenizer.json").stat().st_mtime)
    assert [(model["id"], model["created"]) for model in models] == [("me/mine", written)]
    assert models[0]["answer"]["usage"]["completion_tokens"] == 4


@pytest.fixture
def missed_run(chat_folder: Path, tmp_path: Path) -> Path:
    """A run whose q8_0 file is not the model as trained."""
    shutil.copytree(chat_folder, tmp_path / "exports")
    (tmp_path / "exports" / "x-q8_0.gguf").touch()
    missed = {"mean_kl": 0.5, "max_mean_kl": 0.01, "passed": False}
    certificate = {"artefacts": {"q8_0": missed}, "passed": False}
    (tmp_path / "certificate.json").write_text(json.dumps(certificate))
    return tmp_path


def test_what_missed_its_certificate_is_neither_served_nor_asked(missed_run: Path) -> None:
    with pytest.raises(GateMissed, match="not certified: q8_0"):
        serve(missed_run, Settings(port=0), lambda *_: None)
    with pytest.raises(GateMissed, match="not certified: q8_0"):
        next(ask_both_modes(missed_run, "hi", ""))


def ask_scripted(
    folder: Path, serving: Any, monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine
) -> list[Any]:
    @contextmanager
    def started(*_: object) -> Iterator[tuple[str, str]]:
        with serving(engine) as base:
            yield f"{base}/v1", "none"

    monkeypatch.setattr(asking, "_server", started)
    return list(ask_both_modes(folder, "hi", "Be brief."))


def test_a_question_is_asked_in_both_modes(
    chat_folder: Path, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(["<think>", "\nhm\n", "</think>", "\n\n", "yes"])
    told = ask_scripted(chat_folder, serving, monkeypatch, engine)

    assert told[0] == ("thinking", "hm", "yes")
    assert told[1][0] == "direct"
    assert {sampling.temperature for _, sampling in engine.asked} == {0.0}


def test_a_question_that_fails_is_one_sentence(
    chat_folder: Path, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PipelineError, match="in thinking mode: Provider returned error"):
        ask_scripted(chat_folder, serving, monkeypatch, ScriptedEngine(fails_at=0))


def test_a_wrong_option_is_one_sentence(chat_folder: Path, tmp_path: Path) -> None:
    for file in chat_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "x.gguf").write_text("")
    for wrong, said in (
        (Settings(engine="steam"), "engine 'steam' is unknown"),
        (Settings(model="mine"), "--model mine: give AUTHOR/SLUG"),
        (Settings(model="me/x", adapters={"me/x": tmp_path}), "two models would be called me/x"),
    ):
        with pytest.raises(PipelineError, match=said):
            serve(tmp_path, replace(wrong, port=0), lambda *_: None)


def test_serving_needs_none_of_the_training_libraries() -> None:
    heavy = "{'torch', 'transformers', 'trl', 'peft', 'datasets'}"
    program = "import sys, pipeline.serve.server, pipeline.serve.terminal\n"
    program += f"sys.exit(bool({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_answers_and_stops_cleanly(
    process: Start, tiny_gguf: Path, tmp_path: Path, number: signal.Signals
) -> None:
    running = process(tiny_gguf.parent)
    with ask(address_of(running), max_tokens=8) as response:
        reply = json.load(response)
    assert 0 < reply["usage"]["completion_tokens"] <= 8

    running.send_signal(number)

    assert running.wait(timeout=10) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_the_model_loads_leaves_nothing(
    process: Start, tiny_gguf: Path, tmp_path: Path
) -> None:
    running = process(tiny_gguf.parent)
    while not list(tmp_path.glob("*/engine.sock")):
        assert running.poll() is None
    begin = time.monotonic()
    running.send_signal(signal.SIGTERM)

    assert running.wait(timeout=10) == 0
    assert time.monotonic() - begin < 2
    assert list(tmp_path.iterdir()) == []


def test_an_engine_killed_in_the_middle_of_a_reply_is_there_for_the_next(
    process: Start, tiny_gguf: Path, tmp_path: Path
) -> None:
    running = process(tiny_gguf.parent, context_tokens=20_000)
    base = address_of(running)
    with ask(base, max_tokens=19_000, stream=True) as response:
        told = events(response)
        next(told)
        os.kill(child_of(running), signal.SIGKILL)
        rest = [event for event in told if event != "[DONE]"]
    assert [event for event in rest if "error" in json.loads(event)] == rest[-1:]

    with ask(base, max_tokens=4) as response:
        assert json.load(response)["usage"]["completion_tokens"] == 4

    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=10) == 0
    [log] = tmp_path.iterdir()
    assert log.suffix == ".log", "what the dead engine said is kept"
    assert log.stat().st_size > 0


def test_a_signal_lets_running_replies_end_and_no_other_begin(
    process: Start, tiny_gguf: Path
) -> None:
    running = process(tiny_gguf.parent, context_tokens=2000, grace_s=60)
    base = address_of(running)
    root = base.url.removesuffix("/api/v1")
    with ask(base, max_tokens=600, stream=True) as response:
        told = events(response)
        next(told)
        running.send_signal(signal.SIGTERM)
        with pytest.raises(urllib.error.HTTPError, match="503") as caught, ask(base):
            pass
        assert int(caught.value.headers["Retry-After"]) >= 1
        caught.value.close()
        with (
            pytest.raises(urllib.error.HTTPError, match="503") as caught,
            urllib.request.urlopen(f"{root}/ready", timeout=5),
        ):
            pass
        caught.value.close()
        *_, last, done = told
    assert done == "[DONE]"
    assert json.loads(last)["usage"]["completion_tokens"] == 600
    assert running.wait(timeout=10) == 0


def test_a_reply_that_outlasts_the_grace_period_ends_in_an_error(
    process: Start, tiny_gguf: Path, tmp_path: Path
) -> None:
    running = process(tiny_gguf.parent, context_tokens=20_000, grace_s=1)
    with ask(address_of(running), max_tokens=19_000, stream=True) as response:
        told = events(response)
        next(told)
        running.send_signal(signal.SIGTERM)
        *_, last, done = told
    assert (done, "error" in json.loads(last)) == ("[DONE]", True)
    assert running.wait(timeout=10) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_killed_takes_its_engine_and_socket_along(
    process: Start, tiny_gguf: Path, tmp_path: Path
) -> None:
    running = process(tiny_gguf.parent)
    address_of(running)
    child = child_of(running)
    assert list(tmp_path.glob("*/engine.sock"))

    running.kill()
    running.wait()

    while lives(child):
        time.sleep(0.01)
    assert not list(tmp_path.glob("llamacpp-*/"))


def test_what_a_server_killed_while_loading_has_left_is_removed_by_the_next(
    process: Start, tiny_gguf: Path, tmp_path: Path
) -> None:
    running = process(tiny_gguf.parent)
    while not (sockets := list(tmp_path.glob("*/engine.sock"))):
        assert running.poll() is None
    child = child_of(running)
    running.kill()
    running.wait()
    while lives(child):
        time.sleep(0.01)

    after = process(tiny_gguf.parent)
    address_of(after)

    assert sockets[0] not in list(tmp_path.glob("*/engine.sock"))
    assert len(list(tmp_path.glob("*/engine.sock"))) == 1


@pytest.mark.slow
def test_a_checkpoint_and_adapters_on_it_are_models_of_one_engine(
    process: Start, tiny_base: Path, tiny_adapter: Path
) -> None:
    adapters = {"local/a": str(tiny_adapter), "me/b": str(tiny_adapter)}
    running = process(tiny_base, adapters=adapters, model="me/base")
    base = address_of(running)
    child_of(running)  # there is one
    with urllib.request.urlopen(f"{base.url}/models", timeout=5) as response:
        names = [model["id"] for model in json.load(response)["data"]]
    assert names == ["me/base", "local/a", "me/b"]

    said = {}
    for name in names:
        with ask(base, model=name, max_tokens=16) as response:
            said[name] = json.load(response)["choices"][0]["message"]
    assert said["local/a"] == said["me/b"] != said["me/base"]


@pytest.mark.node
def test_an_idle_server_of_golden_is_small(process: Start, golden: Path) -> None:
    running = process(golden)
    address_of(running)
    status = Path(f"/proc/{running.pid}/status").read_text()
    [resident] = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    assert int(resident) * 1024 < 200e6


def test_no_response_waits_for_an_acknowledgement_of_its_headers() -> None:
    # Where the protocol is named asyncio sets TCP_NODELAY on every connection.
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
