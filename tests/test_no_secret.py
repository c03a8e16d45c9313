"""A real server with secrets of every kind, good and bad days: none of them is in what it leaves.

Of a key only the sha256 is in the books. What was said to it is nowhere but in its answers.
"""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from asking import Server, chunks
from collector import Collector, collecting
from elsewhere import free_port, llamacpp_at

from pipeline.chat import Chat

pytestmark = pytest.mark.slow
WORDS = "periwinkle and xylograph"
MESSAGES = [{"role": "user", "content": WORDS}]
PRICE = '{prompt: "0.001", completion: "0.001"}'
SERVE = """
models:
  - slug: acme/tiny
    gguf: {gguf}
    engine: llamacpp
    slots: 2
    price: {price}
    upstreams: [{{url: "{upstream}/v1", key_env: THEIR_KEY, model: theirs, provider: Theirs}}]
  - {{slug: acme/remote, urls: ["http://127.0.0.1:{port}"], tokenizer: {folder}}}
"""
OURS = {
    "THEIR_KEY": "sk-or-v1-" + sha256(b"upstream").hexdigest(),
    "PIPELINE_ENGINE_KEY": "engine-" + sha256(b"engine").hexdigest(),
    "COLLECTOR_KEY": "collector-" + sha256(b"collector").hexdigest(),
}
WRONG = "sk-or-v1-" + sha256(b"wrong").hexdigest()


@dataclass
class Left:
    """All that came out of it, by where."""

    folder: Path
    outputs: dict[str, bytes] = field(default_factory=dict)

    def add(self, where: str, what: bytes) -> None:
        self.outputs[where] = self.outputs.get(where, b"") + what

    def keep_files(self) -> None:
        """As they are now: some are gone when a server has ended."""
        for file in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                if file.is_file() and not file.name.endswith((".gguf", "serve.yaml")):
                    self.add(f"file {file.relative_to(self.folder)}", file.read_bytes())

    def find(self, secret: str) -> list[str]:
        """Where any 16 characters in a row of it stand."""
        bare = secret.rpartition("-")[2].encode()
        pieces = {bare[place : place + 16] for place in range(len(bare) - 15)}
        found = re.compile(b"|".join(map(re.escape, pieces)))
        return [where for where, what in self.outputs.items() if found.search(what)]


@contextmanager
def gossip() -> Iterator[str]:
    """A server elsewhere that refuses, and repeats the key in its reason."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {"data": []})

        def do_POST(self) -> None:
            said = self.headers["authorization"]
            self._answer(400, {"error": {"code": 400, "message": f"I know no {said}, {said[7:]}"}})

        def _answer(self, status: int, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@dataclass
class Life:
    """A running server, and what it has left so far."""

    left: Left
    url: str
    process: subprocess.Popen[str]
    keys: dict[str, str]
    made: list[str] = field(default_factory=list)
    """Keys it has made when asked to."""

    def ask(self, path: str, body: Any = None, key: str | None = None, **headers: str) -> int:
        """Its status; what it says is kept."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        if key is not None:
            named["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}{path}", data, named)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, told, text = response.status, response.headers, response.read()
        except urllib.error.HTTPError as refused:
            with refused:
                status, told, text = refused.code, refused.headers, refused.read()
        if path == "/api/v1/keys" and status == 201:  # it is shown this once
            self.made.append(json.loads(text).pop("key"))
            text = text.replace(self.made[-1].encode(), b"")
        self.left.add(f"response {status} {path}", str(told).encode() + text)
        return int(status)

    def engines(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state")}
    arguments = [sys.executable, "-m", "pipeline", *command]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True)
    return done.stdout + done.stderr


def make_keys(folder: Path) -> dict[str, str]:
    kinds = {
        "usual": (),
        "poor": ("--limit", "0.0001"),
        "hurried": ("--requests-per-minute", "1"),
        "manager": ("--management",),
        "kept": ("--log-content",),
        "gone": (),
    }
    made = {
        name: run(folder, "keys", "create", "--name", name, *options).split()[-1]
        for name, options in kinds.items()
    }
    run(folder, "keys", "disable", "gone")
    return made


@contextmanager
def living(folder: Path, gguf: Path, chat_folder: Path, collector: Collector) -> Iterator[Life]:
    """From the first to the last word of a server."""
    left, keys, port = Left(folder), make_keys(folder), free_port()
    places = {name: folder / name for name in ("state", "temporary")}
    places["temporary"].mkdir()
    environment = {
        **os.environ,
        **OURS,
        "PIPELINE_LOG": "json",
        "XDG_STATE_HOME": str(places["state"]),
        "TMPDIR": str(places["temporary"]),
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer {OURS['COLLECTOR_KEY']}",
    }
    command = [sys.executable, "-m", "pipeline", "serve", str(folder / "serve.yaml"), "--port", "0"]
    with gossip() as upstream, llamacpp_at(port, gguf), (folder / "stderr").open("w") as errors:
        text = SERVE.format(
            gguf=gguf, price=PRICE, upstream=upstream, port=port, folder=chat_folder
        )
        (folder / "serve.yaml").write_text(text)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process:
            try:
                assert process.stdout is not None
                while "serving at" not in (line := process.stdout.readline()):
                    assert line, (folder / "stderr").read_text()
                    left.add("stdout", line.encode())
                url = line.split()[2].removesuffix("/api/v1")
                yield Life(left, url, process, keys)
            finally:
                process.send_signal(signal.SIGTERM)
            left.add("stdout", process.stdout.read().encode())
    left.keep_files()
    left.add("traces", re.sub(r"(?mi)^authorization:.*$", "", collector.text).encode())


def spend_good_days(life: Life) -> None:
    """Every dialect, streamed and not, by either header; and what is told of keys and replies."""
    key = life.keys["usual"]
    asked: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": MESSAGES, "debug": {"echo_upstream_body": True}},
        "completions": {"prompt": WORDS},
        "responses": {"input": WORDS, "max_output_tokens": 5},
        "messages": {"messages": MESSAGES},
    }
    for path, body in asked.items():
        for stream in (True, False):
            more = {"max_tokens": 5, "model": "acme/tiny", "stream": stream}
            assert life.ask(f"/api/v1/{path}", {**more, **body}, key) == 200
            assert life.ask(f"/v1/{path}", {**more, **body}, None, x_api_key=key) == 200
    body = {"messages": MESSAGES, "model": "acme/remote", "max_tokens": 5}
    wants = {"X_OpenRouter_Metadata": "enabled", "X_OpenRouter_Cache": "true"}
    assert life.ask("/api/v1/chat/completions", body, key, **wants) == 200
    for path in ("key", "credits", "activity", "models", "models/user", "providers"):
        assert life.ask(f"/api/v1/{path}", None, key) == 200
    for path in ("docs", "openapi.json", "health", "ready", "metrics", "provider/v1/models"):
        assert life.ask(f"/{path}") == 200
    manager = life.keys["manager"]
    assert life.ask("/api/v1/keys", None, manager) == 200
    assert life.ask("/api/v1/keys", {"name": "made"}, manager) == 201


def make_mistakes(life: Life) -> None:
    """The client's own, each with a key at hand."""
    chat, body = "/api/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5}
    keys = life.keys
    for key, status in (
        ("kept", 200),
        ("gone", 401),
        ("poor", 402),
        ("manager", 403),
        ("hurried", 200),
    ):
        assert life.ask(chat, body, keys[key]) == status
    assert life.ask(chat, body, keys["hurried"]) == 429
    assert life.ask(chat, body, WRONG) == 401
    assert life.ask(f"{chat}?key={keys['usual']}", body) == 401
    life.left.outputs.pop(f"response 401 {chat}?key={keys['usual']}")
    assert life.ask("/api/v1/keys", None, keys["usual"]) == 403
    for path in ("chat/completions", "completions", "responses", "messages"):
        for wrong in (b"{", b"[]", b'{"model": 1}', b'{"model": "acme/nobody"}', b"\xff"):
            assert life.ask(f"/api/v1/{path}", wrong, keys["usual"]) == 400
        assert life.ask(f"/api/v1/{path}", b"", keys["usual"], Content_Encoding="gzip") == 415
    assert life.ask("/api/v1/generation?id=gen-1-none", None, keys["usual"]) == 404


def lose_the_engine(life: Life, chat: Chat) -> None:
    """In the middle of a stream; then ask the upstream, which says what it should not."""
    ends = {str(chat.token_id(end)): -100 for end in ("<|im_end|>", "<|endoftext|>")}
    body = {"messages": MESSAGES, "model": "acme/tiny", "stream": True, "max_tokens": 7000}
    body |= {"logit_bias": ends, "reasoning": {"enabled": False}}
    with Server(f"{life.url}/api/v1", life.keys["usual"]).post(body) as response:
        told = chunks(response)
        next(told)
        life.left.keep_files()
        for engine in life.engines():
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.kill()
        (*_, last) = told
    life.left.add("response broken off", json.dumps(last).encode())
    assert last["error"]["code"] == 502
    elsewhere = {"only": ["theirs"]}
    body = {"messages": MESSAGES, "model": "acme/tiny", "provider": elsewhere}
    assert life.ask("/api/v1/chat/completions", body, life.keys["usual"]) == 400


def lock_the_books(life: Life) -> None:
    """A reply's row goes to the spool; a key cannot be made."""
    books = life.left.folder / "state" / "pipeline" / "books.sqlite"
    with closing(sqlite3.connect(books, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        body = {"messages": MESSAGES, "model": "acme/remote", "max_tokens": 5}
        assert life.ask("/api/v1/chat/completions", body, life.keys["usual"]) == 200
        assert life.ask("/api/v1/keys", {"name": "late"}, life.keys["manager"]) == 503
        assert life.ask("/metrics") == 200
        life.left.keep_files()
        connection.execute("ROLLBACK")


def test_no_secret_is_in_anything_that_a_server_leaves(
    tiny_gguf: Path, chat_folder: Path, chat: Chat, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("life")  # the path of a socket has to be short
    with (
        collecting() as collector,
        living(folder, tiny_gguf, chat_folder, collector) as life,
    ):
        spend_good_days(life)
        make_mistakes(life)
        lock_the_books(life)
        lose_the_engine(life, chat)
        life.left.add("keys list", run(folder, "keys", "list").encode())
        time.sleep(0.1)
        life.left.keep_files()

    left = life.left
    assert life.process.returncode == 0, left.outputs["file stderr"].decode()
    assert left.find(sha256(life.keys["usual"].encode()).hexdigest()), "or the books were not read"
    for name in ("spool", "journal", "log", "jsonl"):
        assert any(where.endswith(f".{name}") and what for where, what in left.outputs.items()), (
            name
        )
    assert len(collector.spans) > 20
    for name, secret in {**life.keys, **OURS, "wrong": WRONG, "made": life.made[0]}.items():
        assert left.find(secret) == [], name
    for word in WORDS.split()[::2]:
        where = [name for name, what in left.outputs.items() if word.encode() in what]
        assert all(name.startswith("response") or ".content/" in name for name in where), where
