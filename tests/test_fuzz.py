"""Whatever is sent, the answer is the API's own: no 5xx, no traceback, no key, always its shape."""

import asyncio
import contextlib
import http.client
import logging
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from fuzzer import Fuzzer, Request
from inside import Answer, ask
from pydantic import BaseModel, ValidationError
from running import running
from scripted import ScriptedEngine
from sqlalchemy import Engine

from pipeline.chat import Chat
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.offer.catalog import Catalog, Served
from pipeline.serve.openapi.errors import ErrorAnswer
from pipeline.serve.openapi.operations import OPERATIONS

NUM_INSIDE, NUM_AT_ONCE, NUM_OVER_HTTP = 10_000, 100, 300
WORDS = ["<think>", "\nhm\n", "</think>", "\n\n", "ye", "s"]


@pytest.fixture
def books(tmp_path: Any) -> Iterator[Engine]:
    with open_books(str(tmp_path)) as opened:
        yield opened


@pytest.fixture
def key_and_app(chat: Chat, books: Engine) -> Iterator[tuple[str, App]]:
    engine = ScriptedEngine(WORDS, able=["seed", "grammar", "logprobs", "logit_bias"])
    with contextlib.closing(Ledger(books)) as ledger:
        keys = Keys(books)
        yield keys.create("mine"), App(Catalog([Served("tiny", chat, engine, 1)]), keys, ledger)


def faults(request: Request, answer: Answer, key: str) -> Iterator[str]:
    """What is wrong with an answer."""
    if not (200 <= answer.status < 300 or 400 <= answer.status < 500):
        yield f"status {answer.status}"
    told = answer.body.decode("utf-8", "replace") + repr(answer.headers)
    if key in told:
        yield "tells the key"
    if re.search(
        r'Traceback|File \\?"/|\.py\b|pydantic|orjson|site-packages|instance of|literal\[', told
    ):
        yield "tells of its inside"
    if answer.status < 400 and b'"message":"Internal Server Error"' in answer.body:
        yield "fails in its midst"
    if request.method == "HEAD" or answer.status < 400:
        return
    if answer.headers.get("content-type") != "application/json":
        yield "is no JSON"
        return
    yield from _faults_of_shape(request.path, answer)


def _faults_of_shape(path: str, answer: Answer) -> Iterator[str]:
    operation = OPERATIONS.get(re.sub("^(/api)?/v1", "", path).rstrip("/"))
    # What is no route, or not by this method, has no dialect yet.
    shapes = {ErrorAnswer, operation.refusal if operation else ErrorAnswer}
    try:
        body = answer.json
        assert any(_fits(shape, body) for shape in shapes)
        assert body["error"]["message"]
        assert body["error"].get("code", answer.status) == answer.status
        if answer.status not in (404, 405) and operation:
            assert _fits(operation.refusal, body)
    except (AssertionError, ValueError, KeyError):
        yield "has another shape"


def _fits(shape: type[BaseModel], body: Any) -> bool:
    try:
        shape.model_validate(body, extra="forbid")
    except ValidationError:
        return False
    return True


def test_ten_thousand_odd_requests_are_answered_or_refused(
    key_and_app: tuple[str, App], caplog: pytest.LogCaptureFixture
) -> None:
    key, app = key_and_app
    fuzzer, found, statuses = Fuzzer(key, 1), [], Counter[int]()
    caplog.set_level(logging.DEBUG)

    async def send_all() -> None:
        for _ in range(NUM_INSIDE // NUM_AT_ONCE):
            requests = [fuzzer.request() for _ in range(NUM_AT_ONCE)]
            answers = await asyncio.gather(*(send(app, request) for request in requests))
            for request, answer in zip(requests, answers, strict=True):
                statuses[answer.status] += 1
                found.extend((fault, request, answer) for fault in faults(request, answer, key))

    asyncio.run(send_all())

    assert not found, (len(found), found[:3])
    assert key not in caplog.text
    assert "Traceback" not in caplog.text
    assert {200, 400, 401, 404, 405} <= statuses.keys()
    assert min(statuses[200], statuses[400]) > NUM_INSIDE / 5, statuses


async def send(app: App, request: Request) -> Answer:
    query = request.query.encode()
    return await ask(app, request.method, request.path, request.headers, request.body, query)


def test_odd_requests_over_http_are_answered_or_refused(
    key_and_app: tuple[str, App], caplog: pytest.LogCaptureFixture
) -> None:
    key, app = key_and_app
    fuzzer, found = Fuzzer(key, 2), []

    with running(app) as base:
        connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=30)
        with contextlib.closing(connection):
            for _ in range(NUM_OVER_HTTP):
                request = fuzzer.request()
                url = quote(request.path) + (f"?{request.query}" if request.query else "")
                headers = {name: text.strip() for name, text in request.headers.items()}
                connection.request(request.method.upper(), url or "/", request.body, headers)
                response = connection.getresponse()
                named = {name.lower(): text for name, text in response.headers.items()}
                answer = Answer(response.status, named, response.read())
                found.extend((fault, request, answer) for fault in faults(request, answer, key))

    assert not found, (len(found), found[:3])
    assert key not in caplog.text
