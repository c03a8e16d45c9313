"""Whatever is sent, and however slowly: a bound, an answer in the API's shape, and an end."""

import http.client
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from asking import CHAT, Server
from conftest import Serving
from scripted import ScriptedEngine

from pipeline.serve import receiving
from pipeline.serve.api.exchange import MAX_BODY_BYTES
from pipeline.serve.asking.request import MAX_DEPTH
from pipeline.serve.receiving import MAX_HEAD_BYTES, MAX_HEADERS

BODY = b'{"messages": [{"role": "user", "content": "hi"}]}'
START = b"POST /api/v1/chat/completions HTTP/1.1\r\nhost: here\r\n"


@dataclass
class Talk:
    """A connection, byte by byte."""

    connection: socket.socket

    def say(self, *parts: bytes) -> "Talk":
        for part in parts:
            self.connection.sendall(part)
        return self

    def hear(self) -> tuple[int, str, bool]:
        """Status and error's type of a refusal in JSON, and whether the connection is over then."""
        response = http.client.HTTPResponse(self.connection)
        response.begin()
        assert response.headers["content-type"] == "application/json"
        error = json.loads(response.read())["error"]
        assert error["code"] == response.status
        return response.status, error["metadata"]["error_type"], self.connection.recv(1) == b""


@pytest.fixture
def base(serving: Serving) -> Iterator[str]:
    with serving(ScriptedEngine()) as address:
        yield address


@contextmanager
def talking(base: str) -> Iterator[Talk]:
    host, port = base.removeprefix("http://").split(":")
    with closing(socket.create_connection((host, int(port)), timeout=20)) as connection:
        yield Talk(connection)


def status_of(base: str, headers: dict[str, str], body: bytes = BODY) -> int:
    request = urllib.request.Request(f"{base}/api/v1{CHAT}", body, headers)
    try:
        with urllib.request.urlopen(request) as response:
            return int(response.status)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code


HEADS = {
    "a header without an end": START + b"x: " + b"a" * MAX_HEAD_BYTES,
    "headers without an end": START + b"x: y\r\n" * (MAX_HEAD_BYTES // 6),
    "a line without an end": b"GET /" + b"a" * MAX_HEAD_BYTES,
    "all at once": START + b"x: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
    "many small ones": START + b"".join(b"x%d: y\r\n" % i for i in range(MAX_HEADERS)) + b"\r\n",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_head_that_is_too_large_is_a_431_and_the_end(base: str, head: bytes) -> None:
    with talking(base) as talk:
        assert talk.say(head).hear() == (431, "payload_too_large", True)
    with talking(base) as talk:  # nobody must be read for as long as it sends
        assert talk.say(*[head] * 20).hear() == (431, "payload_too_large", True)


def test_what_fits_is_answered(base: str) -> None:
    large = {"x": "a" * (MAX_HEAD_BYTES - 1000)}
    many = {f"x{number}": "y" for number in range(MAX_HEADERS - 10)}
    assert status_of(base, large) == status_of(base, many) == 200


def test_each_request_of_a_connection_has_a_head_of_its_own(base: str) -> None:
    with closing(http.client.HTTPConnection(base.removeprefix("http://"))) as connection:
        for _ in range(4):
            connection.request("GET", "/health", headers={"x": "a" * (MAX_HEAD_BYTES // 2)})
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b'{"status":"ok"}')


def test_a_body_that_is_too_large_is_refused_before_it_comes(base: str) -> None:
    with talking(base) as talk:
        talk.say(START, b"content-length: %d\r\n" % (MAX_BODY_BYTES + 1), b"\r\n")
        response = http.client.HTTPResponse(talk.connection)
        response.begin()
        assert (response.status, response.isclosed()) == (413, False)


def test_a_body_in_chunks_is_refused_once_it_is_too_large(base: str) -> None:
    chunk = b"%x\r\n%b\r\n" % (2**20, b"a" * 2**20)
    with talking(base) as talk:
        talk.say(START, b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 9)
        response = http.client.HTTPResponse(talk.connection)
        response.begin()
        assert response.status == 413
        assert json.loads(response.read())["error"]["metadata"]["error_type"] == "payload_too_large"


@pytest.mark.parametrize("path", ["/health", "/api/v1/chat/completions"])
def test_nobody_may_send_for_ever(base: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it after the answer, or trailers, of which there may be any number."""
    monkeypatch.setattr(receiving, "MAX_REQUEST_BYTES", 2**20)
    monkeypatch.setattr(receiving, "LINGER_S", 0.1)
    with talking(base) as talk:
        talk.say(b"POST %b HTTP/1.1\r\nhost: here\r\n" % path.encode())
        talk.say(b"transfer-encoding: chunked\r\n\r\n", b"2\r\n{}\r\n0\r\n")
        with pytest.raises(OSError, match=r"reset|pipe"):  # noqa: PT012 - it may be noticed late
            for _ in range(1_000_000):
                talk.say(b"x: %b\r\n" % (b"a" * 2**16))


PATIENCE_S = 0.3
SLOW = {
    "nothing of a head's end": (START, 408),
    "half a line": (b"GET /hea", 408),
    "nothing of a body": (START + b"content-length: 10\r\n\r\n", 408),
    "half a body": (START + b"content-length: 10\r\n\r\n{", 408),
    "a body in chunks without an end": (START + b"transfer-encoding: chunked\r\n\r\n", 408),
}


@pytest.mark.parametrize(("sent", "status"), SLOW.values(), ids=SLOW)
def test_who_is_too_slow_is_told_and_let_go(
    base: str, sent: bytes, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "RECEIVE_S", PATIENCE_S)
    with talking(base) as talk:
        assert talk.say(sent).hear() == (status, "timeout", True)


def test_a_byte_now_and_then_gains_no_time(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "RECEIVE_S", PATIENCE_S)
    with talking(base) as talk:
        talk.say(START).connection.settimeout(PATIENCE_S / 10)
        for _ in range(1000):
            talk.say(b"x: y\r\n")
            try:
                assert talk.connection.recv(12) == b"HTTP/1.1 408"
                break
            except TimeoutError:
                continue
        else:
            raise AssertionError("it is still read")


def test_who_says_nothing_at_all_is_let_go(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "RECEIVE_S", PATIENCE_S)
    with talking(base) as talk:
        assert talk.connection.recv(1) == b""


def test_a_reply_may_take_longer_than_its_request(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "RECEIVE_S", 0.05)
    messages = [{"role": "user", "content": "hi"}]
    with serving(ScriptedEngine(["word "] * 20, delay_s=0.02)) as base:
        for stream in (True, False):
            reply = Server(f"{base}/api/v1").ask(stream, messages=messages)
            assert reply.answer == "word " * 20


def test_what_comes_slowly_behind_a_request_cuts_no_reply(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "RECEIVE_S", 0.05)
    body = BODY[:-1] + b', "stream": true}'
    engine = ScriptedEngine(["word "] * 20, delay_s=0.02)
    with serving(engine) as base, talking(base) as talk:
        talk.say(START, b"content-length: %d\r\n\r\n" % len(body), body)
        with talk.connection.makefile("rb") as told:
            assert b" 200 " in told.readline()
            talk.say(START)
            stream, refusal = told.read().split(b"data: [DONE]\n\n")
    assert stream.count(b"word ") == 20
    assert b"HTTP/1.1 408 " in refusal


def test_a_body_that_is_packed_is_refused_unread(base: str) -> None:
    for packed in ("gzip", "deflate", "br", "zstd", "identity, gzip"):
        assert status_of(base, {"Content-Encoding": packed}) == 415
    assert status_of(base, {"Content-Encoding": "identity"}) == 200


def test_what_is_no_http_is_refused_in_json(base: str) -> None:
    with talking(base) as talk:
        assert talk.say(b"rubbish\r\n\r\n").hear() == (400, "invalid_request", True)


ASKED = {
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "completions": {"prompt": "hi"},
    "responses": {"input": "hi"},
    "messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
}


@pytest.mark.parametrize(("route", "fields"), ASKED.items())
@pytest.mark.parametrize("level", ['{"a": %s}', "[%s]"])
def test_json_may_be_nested_only_so_deep(
    base: str, route: str, fields: dict[str, Any], level: str
) -> None:
    def ask(depth: int) -> tuple[int, str]:
        nested = "1"
        for _ in range(depth - 1):
            nested = level % nested
        body = f'{json.dumps(fields)[:-1]}, "x": {nested}}}'.encode()
        try:
            with urllib.request.urlopen(f"{base}/api/v1/{route}", body) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()

    assert ask(MAX_DEPTH)[0] == 200
    for depth, why in ((MAX_DEPTH + 1, "nested more than 128 levels deep"), (5000, "is not JSON")):
        status, text = ask(depth)
        assert (status, why in text) == (400, True)
