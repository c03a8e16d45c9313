"""The API's own description: that it says what there is, and that what there is does as it says."""

import asyncio
import html
import json
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import jsonschema
import openapi_spec_validator
import pytest
import schemathesis
from bodies import ANSWERED
from hypothesis import HealthCheck, given, seed, settings
from inside import Answer, ask
from schemathesis.checks import CHECKS, load_all_checks
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.content.files import ContentFiles
from pipeline.serve.content.log import ContentLog
from pipeline.serve.offer.catalog import Catalog, Served
from pipeline.serve.openapi.fields import FIELDS
from pipeline.serve.openapi.operations import OPERATIONS
from pipeline.serve.openapi.page import render_page

PATHS = list(OPERATIONS)
THOUGHT = ["<think>", "\nhm\n", "</think>", "\n\n", "ye", "s"]


@pytest.fixture(scope="module")
def key_and_app(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, App]]:
    folder = tmp_path_factory.mktemp("books")
    content = ContentLog(ContentFiles(folder / "content", 1, 2**20))
    engine = ScriptedEngine(THOUGHT, able=["seed", "grammar", "logprobs", "logit_bias"])
    with (
        open_books(str(folder)) as books,
        closing(Ledger(books)) as ledger,
        closing(content) as content_log,
    ):
        keys = Keys(books)
        catalog = Catalog([Served("tiny", chat, engine, 1767225600)])
        app = App(catalog, keys, ledger, content_log=content_log)
        yield keys.create("mine", {"log_content": True}), app


def may_ask(app: App, key: str, path: str) -> str:
    """The key, or one that manages keys where only such a one may ask."""
    if not key or "/keys" not in path:
        return key
    assert app.keys is not None
    return app.keys.create("manager", is_management=True)


@pytest.fixture
def app(key_and_app: tuple[str, App]) -> App:
    return key_and_app[1]


@pytest.fixture
def key(key_and_app: tuple[str, App]) -> str:
    return key_and_app[0]


@pytest.fixture
def document(app: App) -> Any:
    return get(app, "/openapi.json").json


def get(app: App, path: str, key: str = "", query: str = "") -> Answer:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return asyncio.run(ask(app, "GET", path, headers, query=query.encode()))


def post(app: App, path: str, key: str, body: Any) -> Answer:
    headers = {"x-api-key": key} if key else {}
    return asyncio.run(ask(app, "POST", f"/v1{path}", headers, json.dumps(body).encode()))


def told_as(path: str) -> str:
    """The path of a route of the table as the document has it."""
    return path.rpartition(" ")[2].replace("{model}", "{author}/{slug}")


def operation(document: Any, path: str) -> tuple[str, Any]:
    """Its method and what is said of it."""
    item = document["paths"][told_as(path)]
    method, _, _ = path.rpartition(" ")
    (method,) = [method.lower()] if method else item.keys() - {"servers"}
    return method.upper(), item[method]


def validator(document: Any, schema: Any) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**schema, "components": document["components"]})


def body_validator(document: Any, path: str) -> jsonschema.Draft202012Validator:
    content = operation(document, path)[1]["requestBody"]["content"]
    return validator(document, content["application/json"]["schema"])


def check(document: Any, path: str, answer: Answer) -> None:
    """Against what the document says of such an answer."""
    told = operation(document, path)[1]["responses"][str(answer.status)]["content"]
    schema = told[answer.content_type]["schema"]
    value = answer.json if answer.content_type == "application/json" else answer.body.decode()
    validator(document, schema).validate(value)


def ask_route(app: App, document: Any, path: str, key: str) -> Answer:
    """With all that it needs, and nothing beside it."""
    method, said = operation(document, path)
    prefix = "" if "servers" in document["paths"][told_as(path)] else "/api/v1"
    url = prefix + path.rpartition(" ")[2].replace("{model}", "local/tiny")
    key = may_ask(app, key, path)
    if "{hash}" in url:
        assert app.keys is not None
        app.keys.create("to be told of")
        url = url.replace("{hash}", app.keys.all()[-1].hash)
    if "requestBody" in said:
        example = said["requestBody"]["content"]["application/json"]["example"]
        body = example | ({"max_tokens": 9} if "messages" in example else {})
        headers = {"x-api-key": key} if key else {}
        return asyncio.run(ask(app, method, url, headers, json.dumps(body).encode()))
    if method == "DELETE":
        headers = {"x-api-key": key} if key else {}
        return asyncio.run(ask(app, method, url, headers))
    wanted = [p["name"] for p in said["parameters"] if p["in"] == "query" and p["required"]]
    asked = ANSWERED["/chat/completions"][0] | {"provider": None}  # else its content is not kept
    reply = post(app, "/chat/completions", key, asked)
    name = reply.headers.get("x-generation-id", "")
    return get(app, url, key, "&".join(f"{word}={name}" for word in wanted))


def test_the_document_has_the_routes_that_there_are_and_no_others(app: App, document: Any) -> None:
    routes = app._routes
    there = {path: method for path, (method, _) in {**routes.of_server, **routes.of_api}.items()}
    there |= dict.fromkeys(routes.of_models, "GET")
    several = [(path, method) for path, handlers in routes.of_keys.items() for method in handlers]
    there |= {f"{method} {path}": method for path, method in several}

    assert there.keys() == OPERATIONS.keys()
    assert document["paths"].keys() == {told_as(path) for path in there}
    assert {m.upper() for m in document["paths"]["/keys/{hash}"]} == {"GET", "PATCH", "DELETE"}
    for path, method in there.items():
        assert operation(document, path)[0] == method
        servers = document["paths"][told_as(path)].get("servers", document["servers"])
        is_of_server = path in routes.of_server
        assert [s["url"] for s in servers] == (["/"] if is_of_server else ["/api/v1", "/v1"])


def test_it_is_a_valid_openapi_document(document: Any) -> None:
    openapi_spec_validator.validate(document)

    assert document["openapi"].startswith("3.1")


def test_it_is_made_once(app: App) -> None:
    description = app._routes.of_server["/docs"][1].__self__  # type: ignore[attr-defined]
    get(app, "/docs")
    made = description._made
    get(app, "/openapi.json")

    assert description._made is made


def test_every_field_of_a_request_is_described_and_nothing_else_is(document: Any) -> None:
    schemas = document["components"]["schemas"]
    bodies = [name for name in schemas if re.fullmatch(r"[A-Z]\w+Body", name)]
    there = {field for name in bodies for field in schemas[name]["properties"]}

    assert len(bodies) == 7
    assert there == FIELDS.keys()
    assert schemas["ChatBody"]["properties"]["top_p"]["anyOf"][0]["exclusiveMinimum"] == 0


@pytest.mark.parametrize("path", PATHS)
def test_a_route_needs_a_key_if_the_document_says_so(app: App, document: Any, path: str) -> None:
    method, said = operation(document, path)

    is_refused = ask_route(app, document, path, "").status == 401

    assert is_refused == bool(said["security"])
    assert ("401" in said["responses"]) == is_refused
    if method == "GET" and is_refused:
        check(document, path, ask_route(app, document, path, ""))


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_is_as_its_shape_says_and_has_nothing_more(
    app: App, document: Any, key: str, path: str
) -> None:
    answer = ask_route(app, document, path, key)

    check(document, path, answer)
    shape = OPERATIONS[path].answer
    assert (answer.status == OPERATIONS[path].status) == (shape is not None)
    if shape is not None and answer.content_type == "application/json":
        shape.model_validate_json(answer.body, extra="forbid")


def test_what_the_document_calls_a_shape_is_strict_in_tests() -> None:
    shape = OPERATIONS["/models"].answer
    assert shape is not None
    page = {"data": [], "total_count": 0, "links": {"next": None, "last": None}}

    with pytest.raises(ValueError, match=r"links\.last"):
        shape.model_validate_json(json.dumps(page), extra="forbid")


@pytest.mark.parametrize(
    ("path", "body"), [(path, body) for path, bodies in ANSWERED.items() for body in bodies]
)
def test_a_body_that_is_answered_is_one_by_the_document(
    app: App, document: Any, key: str, path: str, body: Any
) -> None:
    body_validator(document, path).validate(body)
    answer = post(app, path, key, body)

    assert answer.status == 200, answer.body
    check(document, path, answer)
    told = OPERATIONS[path]
    if answer.content_type == "application/json":
        assert told.answer is not None
        told.answer.model_validate_json(answer.body, extra="forbid")
        return
    events = re.findall(rb"^data: ({.*})$", answer.body, re.MULTILINE)
    assert len(events) > 2
    assert told.event is not None
    is_open = not told.event.model_fields.keys() - {"type", "sequence_number"}
    for event in events:
        told.event.model_validate_json(event, extra="ignore" if is_open else "forbid")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", {}),
        ("/chat/completions", {"messages": [{"role": "robot", "content": "x"}]}),
        ("/chat/completions", {"prompt": "x", "top_p": 1.5}),
        ("/chat/completions", {"prompt": "x", "stop": ["1", "2", "3", "4", "5"]}),
        ("/chat/completions", {"prompt": "x", "tools": [{"type": "function"}]}),
        ("/completions", {"messages": []}),
        ("/responses", {"instructions": "x"}),
        ("/responses", {"input": "x", "tools": [{"type": "function"}]}),
        ("/messages", {"messages": []}),
        ("/messages", {"messages": [{"role": "user", "content": 1}]}),
    ],
)
def test_a_body_that_is_refused_is_none_by_the_document(
    app: App, document: Any, key: str, path: str, body: Any
) -> None:
    answer = post(app, path, key, body)

    assert answer.status == 400
    check(document, path, answer)
    assert not body_validator(document, path).is_valid(body)


def test_the_page_is_html_that_needs_nothing_else(app: App, document: Any) -> None:
    answer = get(app, "/docs")
    page = answer.body.decode()

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-length"] == str(len(answer.body))
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"<script|<link|<img|\ssrc=|url\(", page)
    assert set(re.findall(r'href="([^#][^"]*)"', page)) == {"openapi.json"}
    anchors = re.findall(r'id="([^"]+)"', page)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(anchors)
    for name in ("lang=", "<title>", "<main>", "<nav aria-label", '<th scope="row">', "<caption>"):
        assert name in page


def test_the_page_tells_of_every_route_and_every_field(app: App, document: Any) -> None:
    page = html.unescape(get(app, "/docs").body.decode())

    for path in PATHS:
        prefix = "" if "servers" in document["paths"][told_as(path)] else "/api/v1"
        method, said = operation(document, path)
        assert f"<code>{method} {prefix}{told_as(path)}</code>" in page
        assert said["summary"] in page
    for name, schema in document["components"]["schemas"].items():
        for field in schema.get("properties", ()):
            assert f"<code>{field}</code>" in page, (name, field)
    assert "more than 0; at most 1" in page
    assert "at most 4 of them" in page


def test_the_page_escapes_what_the_document_says(document: Any) -> None:
    document["info"]["description"] = "<script>alert('x')</script>"
    document["paths"]["/key"]["get"]["summary"] = "<b>&"
    page = render_page(document)

    assert "&lt;script&gt;alert(" in page
    assert "&lt;b&gt;&amp;." in page
    assert "<script>" not in page


load_all_checks()
BEYOND_A_SCHEMA = CHECKS.get_one("positive_data_acceptance")


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *[(path, POSITIVE) for path in PATHS],
        # A query that is not understood is ignored, so only a body can be wrong.
        *[(path, NEGATIVE) for path in PATHS if OPERATIONS[path].ask],
    ],
)
def test_schemathesis_finds_no_fault(key_and_app: Any, path: str, mode: Any) -> None:
    key, app = key_and_app
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    method, _, _ = path.rpartition(" ")
    (found,) = [
        o.ok()
        for o in schema.get_all_operations()
        if o.ok().path == told_as(path) and method in ("", o.ok().method.upper())
    ]
    key = may_ask(app, key, path)

    @seed(7)
    @settings(max_examples=20, database=None, suppress_health_check=list(HealthCheck))
    @given(case=found.as_strategy(generation_mode=mode))
    def hold(case: schemathesis.Case) -> None:
        answer = case.call(headers={"Authorization": f"Bearer {key}"})
        case.validate_response(answer, excluded_checks=[BEYOND_A_SCHEMA])

    hold()
