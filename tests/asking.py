"""A client of a running server, and a reply however it came."""

import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CHAT = "/chat/completions"


class Refused(Exception):
    """An answer that is no reply."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(body["error"]["message"])
        self.status = status
        self.error_type = body["error"]["metadata"]["error_type"]


@dataclass
class Reply:
    """One choice."""

    reasoning: str = ""
    answer: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish: str | None = None
    logprobs: list[Any] = field(default_factory=list)

    @property
    def logprob_bytes(self) -> bytes:
        return bytes(byte for token in self.logprobs for byte in token["bytes"])


@dataclass
class Replies:
    """What came back."""

    choices: list[Reply]
    usage: dict[str, Any]
    ignored: str | None = None
    error: dict[str, Any] | None = None
    """In the body or the stream: the status was out."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.choices[0], name)


@dataclass(frozen=True)
class Server:
    """Where it is, and who asks."""

    url: str
    key: str = ""
    model: str = ""

    @contextmanager
    def post(self, body: Any, path: str = CHAT) -> Iterator[http.client.HTTPResponse]:
        """The response as it begins; at the end the connection is closed, read or not."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=120)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        with closing(connection):
            connection.request("POST", urlsplit(self.url).path + path, json.dumps(body), headers)
            with connection.getresponse() as response:
                yield response

    def ask(self, stream: bool = False, **fields: Any) -> Replies:
        """A request's replies; raises Refused."""
        model = {"model": self.model} if self.model else {}
        with self.post({"stream": stream, **model, **fields}) as response:
            if response.status != 200:
                raise Refused(response.status, json.loads(response.read()))
            ignored = response.headers["X-Ignored-Parameters"]
            replies = _streamed(response) if stream else _whole(json.loads(response.read()))
        replies.ignored = ignored
        return replies


@contextmanager
def run_server(model: Path, books: Path, *options: str) -> Iterator[Server]:
    """`pipeline serve` as a process of its own, until the end; asked as the key it begins with."""
    command = [sys.executable, "-m", "pipeline", "serve", str(model), "--port", "0"]
    command += ["--books", str(books), *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            said = {}
            while "serving at" not in said:
                line = process.stdout.readline()
                assert line, "the server did not start"
                if found := re.match(r"(serving at|key) (\S+)", line):
                    said[found[1]] = found[2]
            yield Server(said["serving at"], said["key"], f"local/{model.name}")
        finally:
            process.terminate()
    assert process.returncode == 0


def chunks(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The objects of a stream, as they come."""
    for line in response:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def _whole(body: Any) -> Replies:
    choices = []
    for choice in body["choices"]:
        message = choice["message"]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        choices.append(
            Reply(
                message["reasoning"] or "",
                message["content"] or "",
                [(call["name"], call["arguments"]) for call in calls],
                choice["finish_reason"],
                (choice["logprobs"] or {"content": []})["content"],
            )
        )
    return Replies(choices, body["usage"], error=body["choices"][0].get("error"))


def _streamed(response: http.client.HTTPResponse) -> Replies:
    choices: dict[int, Reply] = {}
    usage, error = {}, None
    for chunk in chunks(response):
        usage, error = chunk.get("usage", usage), chunk.get("error", error)
        for choice in chunk["choices"]:
            reply, delta = choices.setdefault(choice["index"], Reply()), choice["delta"]
            reply.reasoning += delta.get("reasoning") or ""
            reply.answer += delta.get("content") or ""
            reply.logprobs += (choice.get("logprobs") or {"content": []})["content"]
            reply.finish = choice["finish_reason"] or reply.finish
            for call in delta.get("tool_calls", ()):
                _add_call(reply, call)
    return Replies([choices[index] for index in sorted(choices)], usage, error=error)


def _add_call(reply: Reply, call: Any) -> None:
    if "id" in call:
        assert call["index"] == len(reply.calls)
        reply.calls.append((call["function"]["name"], ""))
    name, arguments = reply.calls[call["index"]]
    reply.calls[call["index"]] = (name, arguments + call["function"]["arguments"])


class Response:
    """What came back over a real connection."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.text = response.read().decode()

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def chunks(self) -> list[Any]:
        lines = [line for line in self.text.split("\n\n") if line.startswith("data: {")]
        return [json.loads(line.removeprefix("data: ")) for line in lines]
