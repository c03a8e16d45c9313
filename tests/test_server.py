"""`pipeline serve` as a process: starts, answers, stops, leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import BaseError, PipelineError
from pipeline.serve.server import Settings, serve

SERVE = """
import sys
from pathlib import Path
from pipeline.serve.server import Settings, serve

def ready(url):
    sys.stdout.write(url + "\\n")
    sys.stdout.flush()

serve(Path(sys.argv[1]), Settings(port=0, slots=1, context_tokens=512), ready)
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Start `serve` with a temporary folder of its own for sockets and logs."""
    started: list[subprocess.Popen[str]] = []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TMPDIR": str(tmp_path),
    }

    def start(path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SERVE, str(path)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        )
        return started[-1]

    yield start
    for running in started:
        running.kill()
        running.communicate()


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_taken_port_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("")
    (tmp_path / "x.gguf").write_text("")
    with taken_port() as port, pytest.raises(PipelineError, match="choose another port"):
        serve(tmp_path, Settings(port=port), lambda _: None)
    with pytest.raises(BaseError, match="is not a tokenizer"):
        serve(tmp_path, Settings(port=0), lambda _: None)


def test_an_unknown_engine_is_one_sentence(chat_folder: Path, tmp_path: Path) -> None:
    for file in chat_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "x.gguf").write_text("")
    with pytest.raises(PipelineError, match="engine 'steam' is unknown"):
        serve(tmp_path, Settings(port=0, engine="steam"), lambda _: None)


def test_serving_needs_none_of_the_training_libraries() -> None:
    heavy = "{'torch', 'transformers', 'trl', 'peft', 'datasets'}"
    program = "import sys, pipeline.serve.server, pipeline.serve.terminal\n"
    program += f"sys.exit(bool({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_answers_and_stops_cleanly(
    process: Callable[[Path], subprocess.Popen[str]],
    tiny_gguf: Path,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    running = process(tiny_gguf.parent)
    assert running.stdout is not None
    base = running.stdout.readline().strip()
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(f"{base}/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        reply = json.load(response)
    assert 0 < reply["usage"]["completion_tokens"] <= 8

    running.send_signal(number)

    assert running.wait(timeout=10) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_the_model_loads_leaves_nothing(
    process: Callable[[Path], subprocess.Popen[str]], tiny_gguf: Path, tmp_path: Path
) -> None:
    running = process(tiny_gguf.parent)
    while not list(tmp_path.glob("*/engine.sock")):
        assert running.poll() is None
    begin = time.monotonic()
    running.send_signal(signal.SIGTERM)

    assert running.wait(timeout=10) == 0
    assert time.monotonic() - begin < 2
    assert list(tmp_path.iterdir()) == []
