"""The ways to a scripted engine that the gateway's benchmark compares, each a process."""

import asyncio
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipeline.bench.gateway_engine import MODEL
from pipeline.bench.gateway_load import Target
from pipeline.chat import CALL, END_THINK, Chat
from pipeline.errors import PipelineError

_READY_S = 120
Body = Callable[[Sequence[Any], Mapping[str, Any]], Mapping[str, Any]]
"""Messages, and the fields that our server understands, as the body of a request."""


@dataclass(frozen=True)
class Way:
    """One way to have a prompt continued."""

    name: str
    target: Target
    body: Body
    process: "subprocess.Popen[str]"

    def cpu_s(self) -> float:
        """Seconds its process has computed."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


@dataclass
class Ways:
    """All of them, and the engine they lead to."""

    engine: Way
    ours: Way
    inside: Way
    """Ours over an engine in the same process."""
    others: list[Way]
    left_out: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def over_http(self) -> list[Way]:
        """Those that ask the engine over HTTP, and the engine itself."""
        return [self.engine, self.ours, *self.others]

    async def set_step(self, step_s: float) -> None:
        """Of the engine: the time between two tokens."""
        url = self.engine.target.url.replace("/v1/completions", "/step")
        request = urllib.request.Request(url, str(step_s).encode())
        await asyncio.to_thread(lambda: urllib.request.urlopen(request).close())

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is measured on the first core, engine and load on the others; Linux only."""
        if not hasattr(os, "sched_setaffinity"):
            yield
            return
        first, *others = sorted(os.sched_getaffinity(0))
        before = os.sched_getaffinity(0)
        for way in [self.ours, self.inside, *self.others]:
            _pin(way.process.pid, {first})
        for pid in (self.engine.process.pid, os.getpid()):
            _pin(pid, set(others) or {first})
        try:
            yield
        finally:
            _pin(os.getpid(), before)


def start_all(base: Path, litellm: Path, folder: Path, stack: ExitStack) -> Ways:
    """Processes that end with the stack."""
    chat = Chat(base)
    tags = [str(chat.token_id(tag)) for tag in (END_THINK, CALL)]
    process, url = _start_child(stack, "engine", *tags)
    engine = Way("engine", Target("the engine", f"{url}/v1/completions", {}), _raw(chat), process)
    process, inside = _start_child(stack, "inside", str(base))
    target = Target("ours inside", f"{inside}/v1/chat/completions", {})
    ways = Ways(
        engine,
        _start_ours(stack, base, url, folder),
        Way("ours, engine inside", target, _chat, process),
        [],
    )
    process, forwarder = _start_child(stack, "forwarder", str(base), url)
    target = Target("the forwarder", f"{forwarder}/v1/chat/completions", {})
    ways.others.append(Way("forwarder", target, _chat, process))
    if litellm.is_file():
        ways.others.append(_start_litellm(stack, litellm, url, folder))
        asked = [str(litellm.with_name("python")), "-c", _VERSION]
        found = subprocess.run(asked, capture_output=True, text=True, check=False)
        ways.versions = {"litellm": found.stdout.strip()}
    else:
        ways.left_out = f"LiteLLM's proxy is left out: there is no {litellm}."
    return ways


_VERSION = "from importlib.metadata import version; print(version('litellm'))"


def _chat(messages: Sequence[Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"messages": messages, "stream": True, **fields}


def _plain_chat(messages: Sequence[Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return _chat(messages, {"model": MODEL, "max_tokens": fields["max_tokens"]})


def _raw(chat: Chat) -> Body:
    def body(messages: Sequence[Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
        prompt = chat.prompt_ids(messages, None, "direct")
        return {"prompt": prompt, "stop_token_ids": [], "max_tokens": fields["max_tokens"]}

    return body


def _start(stack: ExitStack, command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
    process = stack.enter_context(subprocess.Popen(command, text=True, **options))
    stack.callback(process.terminate)
    return process


def _start_child(stack: ExitStack, name: str, *words: str) -> tuple["subprocess.Popen[str]", str]:
    """One of the modules beside this one, on a socket that takes connections from now on."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        number = listener.fileno()
        module = f"pipeline.bench.gateway_{name}"
        command = [sys.executable, "-m", module, str(number), *words]
        process = _start(stack, command, pass_fds=[number])
        return process, f"http://127.0.0.1:{listener.getsockname()[1]}"


def _start_ours(stack: ExitStack, base: Path, engine: str, folder: Path) -> Way:
    """As a user starts it: with keys, and books on a disk."""
    command = [sys.executable, "-m", "pipeline", "serve", str(base), "--engine", engine]
    command += ["--port", "0", "--books", str(folder / "books.sqlite")]
    process = _start(stack, command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said: dict[str, str] = {}
    while "serving at" not in said:
        line = process.stdout.readline()
        if not line:
            raise PipelineError(f"`{' '.join(command[1:])}` did not start")
        if found := re.match(r"(serving at|key) (\S+)", line):
            said[found[1]] = found[2]
    headers = {"Authorization": f"Bearer {said['key']}"}
    return Way(
        "ours", Target("ours", f"{said['serving at']}/chat/completions", headers), _chat, process
    )


def _start_litellm(stack: ExitStack, program: Path, engine: str, folder: Path) -> Way:
    """One worker and no database: the least it does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    parameters = {"model": f"openai/{MODEL}", "api_base": f"{engine}/v1", "api_key": "none"}
    config = folder / "litellm.yaml"
    models = [{"model_name": MODEL, "litellm_params": parameters}]
    key = f"sk-{secrets.token_hex(32)}"
    settings = {"model_list": models, "general_settings": {"master_key": key}}
    config.write_text(json.dumps(settings), encoding="utf-8")
    command = [
        str(program.absolute()),
        "--config",
        str(config.absolute()),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    # Its list of prices is otherwise fetched from elsewhere.
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    said = stack.enter_context((folder / "litellm.log").open("w", encoding="utf-8"))
    process = _start(
        stack, command, stdout=said, stderr=subprocess.STDOUT, env=environment, cwd=folder
    )
    url = f"http://127.0.0.1:{port}"
    _wait_for(f"{url}/health/liveliness", process, Path(said.name))
    target = Target("LiteLLM", f"{url}/v1/chat/completions", {"Authorization": f"Bearer {key}"})
    return Way("LiteLLM's proxy", target, _plain_chat, process)


def _wait_for(url: str, process: "subprocess.Popen[str]", log_file: Path) -> None:
    """PipelineError if it does not answer."""
    for _ in range(_READY_S):
        with suppress(OSError):
            urllib.request.urlopen(url, timeout=10).close()
            return
        if process.poll() is not None:
            break
        time.sleep(1)
    raise PipelineError(f"LiteLLM's proxy does not answer; see {log_file}")


def _pin(pid: int, cores: set[int]) -> None:
    """Every thread of a process."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has just ended
            os.sched_setaffinity(int(thread.name), cores)
