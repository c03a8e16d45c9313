"""No request makes the server open what it names: no address, and no file, wherever they stand."""

import asyncio
import copy
import json
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bodies import ANSWERED
from inside import ask
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.serve.api.app import App
from pipeline.serve.offer.catalog import Catalog, Served

SECRET = "xylograph"
"""A word of what must not be read."""
NAME = "canary.json"
FILE = f'{{"type": "object", "properties": {{"{SECRET}": {{}}}}}}'


@dataclass
class Trap:
    """An address, and a file, that nobody may ask for."""

    url: str
    file: Path
    num_visits: int = 0

    @property
    def lures(self) -> Iterator[str]:
        url, file = self.url, self.file
        yield from (url, f"file://{file}", str(file), f"../../../../../../../..{file}")
        yield from (f"@preset/{file}", f"tiny@preset/../../..{file}", f"~{file}", f"@{file}")
        yield f"![a]({url}) <img src={url}> {{% include '{file}' %}} {{{{ url_for('{url}') }}}}"


OPENED: list[str] = []


def _watch(event: str, arguments: Any) -> None:
    if event == "open" and str(arguments[0]).endswith(NAME):
        OPENED.append(str(arguments[0]))


sys.addaudithook(_watch)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    file = tmp_path / NAME
    file.write_text(FILE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        trap = Trap(f"http://127.0.0.1:{listener.getsockname()[1]}/{NAME}", file)
        answer = f"HTTP/1.1 200 OK\r\ncontent-length: {len(FILE)}\r\n\r\n{FILE}".encode()

        def serve() -> None:
            with suppress(OSError):
                while True:
                    visitor = listener.accept()[0]
                    with visitor:
                        trap.num_visits += 1
                        visitor.recv(65536)
                        visitor.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        OPENED.clear()
        yield trap
        assert (trap.num_visits, OPENED) == (0, [])
        # Would it have been seen? Both are tried once.
        with urllib.request.urlopen(trap.url) as response:
            assert response.read().decode() == file.read_text()
        assert (trap.num_visits, OPENED) == (1, [str(file)])
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def put(value: Any, lure: Any) -> Iterator[Any]:
    """The same value with the lure in the place of each of its texts, one at a time."""
    if isinstance(value, str):
        yield lure
    if not isinstance(value, dict | list):
        return
    for place in value if isinstance(value, dict) else range(len(value)):
        for changed in put(value[place], lure):
            whole = copy.copy(value)
            whole[place] = changed
            yield whole


def send_all(chat: Chat, requests: Iterator[tuple[str, Any]]) -> set[int]:
    """Whatever is sent, no word of the file comes back, nor does it get to the engine."""
    engine = ScriptedEngine(able=["grammar", "logprobs"])
    app = App(Catalog([Served("tiny", chat, engine, 0)]))
    statuses = set[int]()

    async def send() -> None:
        for path, body in requests:
            answer = await ask(app, "POST", f"/v1{path}", {}, json.dumps(body).encode())
            assert SECRET not in answer.body.decode()
            statuses.add(answer.status)

    asyncio.run(send())
    assert engine.asked
    for prompt_ids, sampling in engine.asked:
        assert SECRET not in chat.decode(prompt_ids)
        assert SECRET not in str(sampling)
    return statuses


@pytest.mark.parametrize("path", ANSWERED)
def test_a_lure_in_the_place_of_any_text_is_only_text(path: str, chat: Chat, trap: Trap) -> None:
    bodies = (
        (path, body) for base in ANSWERED[path] for lure in trap.lures for body in put(base, lure)
    )
    assert send_all(chat, bodies) <= {200, 400, 404}


MESSAGES = [{"role": "user", "content": "hi"}]


def parts(url: str) -> Iterator[tuple[str, Any]]:
    """What other servers would fetch: pictures, documents, files, tools of somebody else's."""
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "file", "file": {"filename": url, "file_data": url, "file_id": url}},
        {"type": "input_image", "image_url": url},
        {"type": "input_file", "file_url": url, "filename": url},
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "document", "source": {"type": "url", "url": url}},
    ):
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "hi"}]}]
        yield "/chat/completions", {"messages": messages}
        yield "/responses", {"input": messages}
        yield "/messages", {"messages": messages, "max_tokens": 5}


def fields(url: str) -> Iterator[tuple[str, Any]]:
    """Fields that are not read here, or that name things."""
    for more in (
        {"preset": url},
        {"model": url},
        {"models": [url, "tiny"]},
        {"chat_template": url},
        {"chat_template_kwargs": {"template": url}},
        {"plugins": [{"id": "web", "engine": url}]},
        {"plugins": [{"id": "file-parser", "pdf": {"engine": url}}]},
        {"tools": [{"type": "mcp", "server_url": url, "server_label": "a"}]},
        {"tools": [{"type": "openrouter:web_fetch", "url": url}]},
        {"mcp_servers": [{"type": "url", "url": url, "name": "a"}]},
        {"callback_url": url, "webhook": {"url": url}, "base_url": url, "api_base": url},
        {"adapter": url, "lora": url, "engine": url, "urls": [url]},
        {"previous_response_id": url, "prompt": {"id": url}, "conversation": url},
    ):
        yield "/chat/completions", {"messages": MESSAGES, **more}
        yield "/responses", {"input": "hi", **more}
        yield "/messages", {"messages": MESSAGES, "max_tokens": 5, **more}
        yield "/completions", {"prompt": "hi", **more}


def test_what_others_would_fetch_is_refused_or_named(chat: Chat, trap: Trap) -> None:
    plain = iter([("/chat/completions", {"messages": MESSAGES})])
    assert send_all(chat, plain) == {200}
    asked = (
        request for lure in trap.lures for ask_for in (parts, fields) for request in ask_for(lure)
    )
    assert send_all(chat, asked) <= {200, 400, 404}


def shapes(lure: str) -> Iterator[tuple[str, Any]]:
    """References of schemas, and imports of grammars."""
    for schema in (
        {"$ref": lure},
        {"$ref": f"{lure}#/properties"},
        {"$schema": lure, "$id": lure, "type": "object"},
        {"type": "object", "properties": {"a": {"$dynamicRef": lure}, "b": {"$ref": lure}}},
        {"$defs": {"a": {"$id": lure, "$ref": lure}}, "$ref": "#/$defs/a"},
        {"$id": lure, "$ref": NAME},
    ):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        yield "/chat/completions", {"messages": MESSAGES, "response_format": form}
        yield "/chat/completions", {"messages": MESSAGES, "tools": [tool]}
        yield (
            "/responses",
            {"input": "hi", "text": {"format": {**form, "name": "a", "schema": schema}}},
        )
        tool = {"name": "f", "input_schema": schema}
        yield "/messages", {"messages": MESSAGES, "max_tokens": 5, "tools": [tool]}
    for grammar in (
        f"%import {lure} (A)\nstart: A\n",
        f'%import "{lure}" (A)\nstart: A\n',
        f"%include {lure}\nstart: /a/\n",
        f'start: @"{lure}"\n',
        f'start: %json {{"$ref": "{lure}"}}\n',
        f'start: %lark "{lure}"\n',
        f"root ::= <{lure}>\n",
    ):
        form = {"type": "grammar", "grammar": grammar}
        yield "/chat/completions", {"messages": MESSAGES, "response_format": form}


def test_no_reference_of_a_schema_and_no_import_of_a_grammar_is_followed(
    chat: Chat, trap: Trap
) -> None:
    asked = (request for lure in trap.lures for request in shapes(lure))
    statuses = send_all(chat, asked)
    assert statuses == {200, 400}


def test_no_part_of_an_address_and_no_header_is_opened(chat: Chat, trap: Trap) -> None:
    app = App(Catalog([Served("tiny", chat, ScriptedEngine(), 0)]))
    paths = ["/docs{}", "{}", "/v1/models/{}/endpoints", "/v1/model/{}", "/v1/keys/{}"]
    names = (
        "host",
        "referer",
        "http-referer",
        "x-title",
        "x-session-id",
        "traceparent",
        "forwarded",
    )

    async def send(lure: str) -> None:
        headers = dict.fromkeys(names, lure)
        for path in paths:
            answer = await ask(app, "GET", path.format(lure), headers)
            assert answer.status in (400, 403, 404)
        query = f"id={lure}&date={lure}&q={lure}&model={lure}&author={lure}".encode()
        for path in ("/docs", "/v1/generation", "/v1/activity", "/v1/models", "/v1/endpoints/zdr"):
            answer = await ask(app, "GET", path, headers, query=query)
            assert answer.status < 500
            assert SECRET not in answer.body.decode()
        body = json.dumps({"messages": MESSAGES}).encode()
        assert (await ask(app, "POST", "/v1/chat/completions", headers, body)).status == 200

    for lure in trap.lures:
        asyncio.run(send(lure))
