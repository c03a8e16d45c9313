"""The content log: what is kept of whom, how it is found again, and where else it is not."""

import asyncio
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from asking import Server, chunks
from inside import Answer, ask
from running import running
from scripted import ScriptedEngine
from sqlalchemy import Engine

from pipeline.chat import Chat
from pipeline.cli.log import JsonLines
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Generation, Ledger
from pipeline.serve.content import log as log_module
from pipeline.serve.content.files import ContentFiles, read_lines
from pipeline.serve.content.log import ContentLog
from pipeline.serve.offer.catalog import Catalog, Served

THOUGHT = ["<think>", "\nhm\n", "</think>", "\n\n", "ye", "s"]
QUESTION = [{"role": "user", "content": "is it so?"}]
CALL = ["sure\n", "<tool_call>", '\n{"name": "look", "arguments": {"at": 1}}\n', "</tool_call>"]
PARAMETERS = {"type": "object", "properties": {"at": {"type": "integer"}}}
# As the official client's own model has it.
SCHEMA = {
    "required": ["error", "input", "output"],
    "properties": {
        "error": {
            "type": ["object", "null"],
            "required": ["message", "previous_errors", "provider_name", "raw", "status"],
        },
        "input": {
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
            ]
        },
        "output": {
            "required": ["completion", "reasoning"],
            "properties": {
                "completion": {"type": ["string", "null"]},
                "reasoning": {"type": ["string", "null"]},
            },
        },
    },
}


@dataclass
class House:
    """An application over a scripted engine, and a key whose content is logged."""

    app: App
    engine: ScriptedEngine
    key: str
    folder: Path

    def post(self, path: str = "/chat/completions", key: str = "", **fields: Any) -> Answer:
        body = fields if {"messages", "input", "prompt"} & fields.keys() else {"messages": QUESTION}
        headers = {"Authorization": f"Bearer {key or self.key}"}
        sent = json.dumps({**body, **fields}).encode()
        return asyncio.run(ask(self.app, "POST", f"/api/v1{path}", headers, sent))

    def content(self, generation_id: str, key: str = "") -> Answer:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        path, query = "/v1/generation/content", f"id={generation_id}".encode()
        return asyncio.run(ask(self.app, "GET", path, headers, query=query))

    @property
    def keys(self) -> Keys:
        assert self.app.keys is not None
        return self.app.keys

    @property
    def lines(self) -> list[Any]:
        """All that was kept; nothing more is from now on."""
        assert self.app.content_log is not None
        self.app.content_log.close()
        return list(read_lines(self.folder))

    def row(self, generation_id: str) -> Generation | None:
        assert self.app.ledger is not None
        return asyncio.run(self.app.ledger.find(generation_id))


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Engine]:
    with open_books(str(tmp_path)) as opened:
        yield opened


@pytest.fixture
def house(chat: Chat, books: Engine, tmp_path: Path) -> Iterator[House]:
    folder = tmp_path / "content"
    engine = ScriptedEngine(THOUGHT, able=["grammar"])
    keys = Keys(books, cache_s=0)
    with (
        closing(Ledger(books)) as ledger,
        closing(ContentLog(ContentFiles(folder, 1, 2**20))) as log,
    ):
        app = App(Catalog([Served("tiny", chat, engine, 1)]), keys, ledger, content_log=log)
        yield House(app, engine, keys.create("mine", {"log_content": True}), folder)


def name_of(answer: Answer) -> str:
    return answer.headers["x-generation-id"]


def logging_with(house: House, redact: Callable[[Any], Any]) -> House:
    content_log = ContentLog(ContentFiles(house.folder, 1, 2**20), redact)
    app = App(house.app.catalog, house.app.keys, house.app.ledger, content_log=content_log)
    return House(app, house.engine, house.key, house.folder)


def test_a_reply_is_kept_with_what_was_asked(house: House) -> None:
    begun_ms = int(time.time() * 1000)
    name = name_of(house.post(temperature=0.5, top_k=3, user="somebody", metadata={"a": "b"}))

    (line,) = house.lines

    assert line.pop("created_ms") >= begun_ms
    assert line == {
        "id": name,
        "key": house.keys.all()[0].hash,
        "model": "local/tiny",
        "provider": "Pipeline",
        "dialect": "chat/completions",
        "messages": QUESTION,
        "settings": {"temperature": 0.5, "top_k": 3},
        "choices": [
            {
                "reasoning": "hm",
                "content": "yes",
                "tool_calls": [],
                "finish_reason": "stop",
                "native_finish_reason": "stop",
                "stop": None,
            }
        ],
        "cancelled": False,
        "error": None,
    }


def test_nothing_is_kept_of_a_key_that_does_not_say_so_or_no_more(house: House) -> None:
    silent = house.keys.create("silent")
    assert house.post(key=silent).status == 200
    house.keys.change(house.keys.all()[0], {"log_content": False})
    assert house.post().status == 200

    assert house.lines == []
    assert not house.folder.exists()


@pytest.mark.parametrize("wish", [{"zdr": True}, {"data_collection": "deny"}])
def test_nothing_is_kept_of_a_request_that_forbids_it(house: House, wish: Any) -> None:
    assert house.post(provider=wish).status == 200
    kept = name_of(house.post(provider={"zdr": False, "data_collection": "allow"}))

    assert [line["id"] for line in house.lines] == [kept]


def test_a_server_without_keys_keeps_nothing(house: House, chat: Chat) -> None:
    app = App(
        Catalog([Served("tiny", chat, ScriptedEngine(), 1)]), content_log=house.app.content_log
    )
    body = json.dumps({"messages": QUESTION}).encode()

    assert asyncio.run(ask(app, "POST", "/v1/chat/completions", body=body)).status == 200
    assert house.lines == []


def test_every_dialect_is_kept_the_same_streamed_or_whole(house: House) -> None:
    tool = {"name": "look", "description": "Looks."}
    asked: dict[str, dict[str, Any]] = {
        "/chat/completions": {
            "messages": [{"role": "system", "content": "Be brief."}, *QUESTION],
            "tools": [{"type": "function", "function": {**tool, "parameters": PARAMETERS}}],
            "reasoning": {"enabled": False},
        },
        "/responses": {
            "instructions": "Be brief.",
            "input": "is it so?",
            "tools": [{"type": "function", **tool, "parameters": PARAMETERS}],
            "reasoning": {"enabled": False},
        },
        "/messages": {
            "system": "Be brief.",
            "messages": QUESTION,
            "max_tokens": 100,
            "tools": [{**tool, "input_schema": PARAMETERS}],
        },
    }
    house.engine.chunks = CALL
    for path, fields in asked.items():
        for stream in (False, True):
            assert house.post(path, **fields, stream=stream).status == 200

    lines = house.lines

    assert [line["dialect"] for line in lines] == [p[1:] for p in asked for _ in range(2)]
    for line in lines:
        assert [choice.pop("native_finish_reason") for choice in line["choices"]] == ["stop"]
        assert line["choices"] == lines[0]["choices"]
        assert line["tools"] == lines[0]["tools"]
        texts = [(message["role"], message["content"]) for message in line["messages"]]
        assert texts == [("system", "Be brief."), ("user", "is it so?")]
    function = {"name": "look", "arguments": '{"at": 1}'}
    assert lines[0]["choices"] == [
        {
            "reasoning": "",
            "content": "sure",
            "tool_calls": [{"type": "function", "function": function}],
            "finish_reason": "tool_calls",
            "stop": None,
        }
    ]


def test_a_text_that_is_continued_is_kept_and_so_is_every_choice(house: House) -> None:
    house.engine.chunks = ["a", "b"]
    name = name_of(house.post("/completions", prompt="once", n=2))
    told = house.content(name).json["data"]

    (line,) = house.lines

    assert (line["prompt"], "messages" in line) == ("once", False)
    assert [choice["content"] for choice in line["choices"]] == ["ab", "ab"]
    jsonschema.validate(told, SCHEMA)
    assert told["input"] == {"prompt": "once"}


def test_a_form_that_was_asked_for_is_kept(house: House) -> None:
    house.engine.chunks = ["{}"]
    schema = {"name": "empty", "schema": {"type": "object"}}
    wanted = {"type": "json_schema", "json_schema": schema}
    house.post(response_format=wanted, reasoning={"enabled": False}, stop=["x"])

    (line,) = house.lines

    assert line["response_format"] == wanted
    assert line["settings"] == {"reasoning": {"enabled": False}, "stop": ["x"]}


def test_a_hidden_thought_and_a_repeated_reply_are_kept_too(house: House) -> None:
    headers = {"Authorization": f"Bearer {house.key}", "X-OpenRouter-Cache": "true"}
    body = json.dumps({"messages": QUESTION, "reasoning": {"exclude": True}}).encode()
    answers = [
        asyncio.run(ask(house.app, "POST", "/v1/chat/completions", headers, body)) for _ in "ab"
    ]
    assert answers[1].headers["x-openrouter-cache-status"] == "HIT"

    lines = house.lines

    assert [line["id"] for line in lines] == [name_of(answer) for answer in answers]
    assert [line["choices"][0]["reasoning"] for line in lines] == ["hm", "hm"]


def test_a_reply_that_fails_is_kept_as_far_as_it_came(house: House) -> None:
    house.engine.fails_at = 5
    whole = name_of(house.post(stream=True))
    house.engine.fails_at = 0
    assert house.post().status == 502
    told = house.content(whole).json["data"]

    begun, failed = house.lines

    assert (begun["choices"][0]["content"], begun["choices"][0]["finish_reason"]) == ("ye", None)
    assert (begun["error"]["type"], begun["error"]["status"]) == ("provider_unavailable", 502)
    assert (failed["choices"][0]["content"], failed["error"]["status"]) == ("", 502)
    jsonschema.validate(told, SCHEMA)
    assert (told["error"]["status"], told["output"]["completion"]) == (502, "ye")


def test_a_hang_up_is_kept_as_cancelled(house: House) -> None:
    house.engine.chunks, house.engine.delay_s = ["word "] * 100_000, 0.01
    with running(house.app) as base:
        with Server(f"{base}/v1", house.key).post({"messages": QUESTION, "stream": True}) as reply:
            next(chunks(reply))
            name = str(reply.headers["X-Generation-Id"])
        while house.row(name) is None:
            time.sleep(0.01)

    (line,) = house.lines

    assert (line["id"], line["cancelled"], line["error"]) == (name, True, None)
    assert line["choices"][0]["finish_reason"] is None
    assert line["choices"][0]["content"].startswith("word ")


def test_content_is_told_to_its_key_alone_as_soon_as_the_reply_has_ended(house: House) -> None:
    other = house.keys.create("other", {"log_content": True})
    name = name_of(house.post(stream=True))

    answer = house.content(name)

    assert (answer.status, answer.content_type) == (200, "application/json")
    jsonschema.validate(answer.json["data"], SCHEMA)
    assert answer.json["data"] == {
        "input": {"messages": QUESTION},
        "output": {"completion": "yes", "reasoning": "hm"},
        "error": None,
    }
    refused = house.content(name, other)
    assert (refused.status, refused.json["error"]["message"]) == (
        404,
        f"Generation {name} not found",
    )


def test_calls_are_told_with_the_content(house: House) -> None:
    house.engine.chunks = CALL[1:]
    tools = [{"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}]
    name = name_of(house.post(tools=tools, messages=QUESTION, reasoning={"enabled": False}))

    output = house.content(name).json["data"]["output"]

    assert (output["completion"], output["reasoning"]) == (None, None)
    assert output["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": 1}'}


def test_content_that_was_not_kept_or_is_gone_is_not_there(house: House) -> None:
    name, private = name_of(house.post()), name_of(house.post(provider={"zdr": True}))
    assert house.content(name).status == 200
    for file in house.folder.iterdir():
        file.unlink()

    for gone in (name, private):
        refused = house.content(gone)
        assert refused.status == 404
        assert refused.json["error"]["message"] == f"Content of generation {gone} is not stored"


def test_an_id_in_somebodys_words_is_no_id(house: House) -> None:
    first = name_of(house.post())
    assert house.content(first).status == 200
    (file,) = house.folder.iterdir()
    later = logging_with(house, lambda line: line)
    later.post(messages=[{"role": "user", "content": f'"id":"{first}"'}])
    os.utime(file, (time.time() + 60,) * 2)  # so that the other's is looked into first

    assert later.content(first).json["data"]["input"]["messages"] == QUESTION


def test_no_reply_waits_for_the_log(house: House) -> None:
    told, were_told = threading.Event(), []

    def slow(line: Any) -> Any:
        were_told.append(told.wait(30))
        return line

    house = logging_with(house, slow)
    names = [name_of(house.post(stream=stream)) for stream in (True, False)]
    told.set()

    assert [line["id"] for line in house.lines] == names
    assert were_told == [True, True], "a reply came only after its content was written"


def test_who_asks_for_content_that_is_on_its_way_gets_it(house: House) -> None:
    def slow(line: Any) -> Any:
        time.sleep(0.3)
        return line

    house = logging_with(house, slow)

    assert house.content(name_of(house.post())).status == 200


def test_what_a_redaction_returns_is_kept_and_nothing_of_none(house: House) -> None:
    def redact(line: Any) -> Any:
        if "drop" in line["messages"][0]["content"]:
            return None
        line["messages"][0]["content"] = "***"
        return line

    house = logging_with(house, redact)
    name = name_of(house.post(messages=[{"role": "user", "content": "my secret"}]))
    house.post(messages=[{"role": "user", "content": "drop me"}])
    assert house.content(name).json["data"]["input"]["messages"][0]["content"] == "***"

    (line,) = house.lines

    assert (line["id"], line["messages"][0]["content"]) == (name, "***")


def test_a_redaction_that_fails_drops_the_entry_and_says_so_without_a_word_of_it(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    def redact(line: Any) -> Any:
        if line["messages"][0]["content"].startswith("text"):
            return "a secret"
        if line["messages"][0]["content"].startswith("bytes"):
            return {"secret": b"secret"}
        raise ValueError(line)

    house = logging_with(house, redact)
    contents = ("text, secret", "bytes, secret", "secret")
    names = [
        name_of(house.post(messages=[{"role": "user", "content": content}])) for content in contents
    ]

    assert house.lines == []
    assert [record.getMessage() for record in caplog.records] == [
        f"the content of {names[0]} is not kept: the redaction returned str, no dict",
        f"the content of {names[1]} is not kept: it is no JSON (TypeError)",
        f"the content of {names[2]} is not kept: the redaction raised ValueError",
    ]
    assert "secret" not in "".join(map(JsonLines().format, caplog.records))


def test_a_disk_that_is_full_loses_content_once_told_and_nothing_else(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    house.folder.write_text("in the way")
    lost = [name_of(house.post(stream=stream)) for stream in (True, False)]
    assert [house.content(name).status for name in lost] == [404, 404]
    assert all(house.row(name) for name in lost)
    house.folder.unlink()
    kept = [name_of(house.post()) for _ in range(2)]
    assert [house.content(name).status for name in kept] == [200, 200]
    shutil.rmtree(house.folder)
    house.folder.write_text("in the way again")
    assert house.content(name_of(house.post())).status == 404

    lost_once = f"content is lost, and nothing else: {house.folder}: File exists"

    assert caplog.messages == [lost_once, "content is kept again", lost_once]


def test_what_a_slow_disk_has_no_time_for_is_lost(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log_module, "MAX_WAITING", 1)
    entered, go_on = threading.Event(), threading.Event()

    def slow(line: Any) -> Any:
        entered.set()
        go_on.wait(30)
        return line

    house = logging_with(house, slow)
    names = [name_of(house.post())]
    assert entered.wait(30)
    names += [name_of(house.post()) for _ in range(3)]
    go_on.set()

    assert [line["id"] for line in house.lines] == names[:2]
    assert (
        caplog.messages.count("content is lost, and nothing else: more comes than can be written")
        == 1
    )


def test_no_word_is_anywhere_but_in_the_content_log(
    house: House, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    house.engine.chunks = ["<think>", "pondered", "</think>", "uttered"]
    words = ("asked-for", "pondered", "uttered")
    asked = [{"role": "user", "content": words[0]}]
    for path, fields in (
        ("/chat/completions", {"messages": asked}),
        ("/responses", {"input": words[0]}),
        ("/messages", {"messages": asked, "max_tokens": 99}),
        ("/completions", {"prompt": words[0]}),
    ):
        for stream in (False, True):
            assert house.post(path, **fields, stream=stream).status == 200
    house.engine.fails_at = 3
    house.post(messages=asked)
    metrics = asyncio.run(ask(house.app, "GET", "/metrics", client=("127.0.0.1", 1)))
    assert metrics.status == 200

    kept = json.dumps(house.lines)

    elsewhere = [file for file in tmp_path.rglob("*") if file.is_file()]
    elsewhere = [file for file in elsewhere if house.folder not in file.parents]
    assert elsewhere, "the books are not where we looked"
    told = [metrics.body, *(file.read_bytes() for file in elsewhere)]
    told += [JsonLines().format(record).encode() for record in caplog.records]
    for word in words:
        assert word in kept
        assert not any(word.encode() in text for text in told)
