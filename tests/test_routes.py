"""Everything but the chat itself: what is told of models, of a key and of what it was used for."""

import asyncio
import datetime
import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import inside
import jsonschema
import pytest
from books import generation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import ScriptedEngine
from sqlalchemy import Engine

from pipeline.chat import Chat
from pipeline.serve.api.app import App
from pipeline.serve.api.listing import ModelsQuery
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.offer.catalog import Catalog, Served

# OpenRouter's own, of its public specification.
SCHEMAS = json.loads((Path(__file__).parent / "openrouter_schemas.json").read_text("utf-8"))
MESSAGES = [{"role": "user", "content": "hi"}]
OF_MODELS = [
    "/models",
    "/models/count",
    "/model/me/tiny",
    "/models/me/tiny/endpoints",
    "/endpoints/zdr",
    "/providers",
]
OF_KEYS = [
    "/models/user",
    "/key",
    "/auth/key",
    "/credits",
    "/generation?id=x",
    "/generation/content?id=x",
    "/activity",
]


class Answer(inside.Answer):
    """What came back from the application."""

    @property
    def data(self) -> Any:
        return self.json["data"]

    @property
    def error(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return self.json["error"]


@dataclass
class House:
    """An application over three models of two engines, its books, and a key for it."""

    app: App
    key: str
    engines: list[ScriptedEngine]
    ledger: Ledger

    def get(self, path: str, key: str | None = None, prefix: str = "/api/v1") -> Answer:
        """With the key, unless another is given."""
        return asyncio.run(self.ask("GET", prefix + path, self.key if key is None else key))

    def post(self, path: str, body: bytes | dict[str, Any]) -> Answer:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        return asyncio.run(self.ask("POST", "/api/v1" + path, self.key, sent))

    async def ask(self, method: str, url: str, key: str = "", body: bytes = b"") -> Answer:
        path, _, query = url.partition("?")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = await inside.ask(self.app, method, path, headers, body, query.encode())
        return Answer(answer.status, answer.headers, answer.body)


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Engine]:
    with open_books(str(tmp_path)) as opened:
        yield opened


@pytest.fixture
def house(chat: Chat, books: Engine) -> Iterator[House]:
    small, large = ScriptedEngine(), ScriptedEngine(able=["seed", "grammar"])
    large.context_tokens = 2000
    models = [
        Served("tiny", chat, small, 20, author="me"),
        Served("tiny-tuned", chat, small, 30, "tuned", author="me"),
        Served("Large", chat, large, 10, author="you"),
    ]
    keys = Keys(books)
    with closing(Ledger(books)) as ledger:
        app = App(Catalog(models), keys, ledger)
        yield House(app, keys.create("mine"), [small, large], ledger)


def check(body: Any, root: str) -> None:
    """Against OpenRouter's schema of that answer."""
    schema = {**SCHEMAS["roots"][root], "components": SCHEMAS["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)


def record(house: House, **fields: Any) -> str:
    """Write a generation, by default of the house's own key, and return its id."""
    assert house.app.keys is not None
    row = generation(**{"key_id": house.app.keys.all()[0].id, **fields})
    asyncio.run(house.ledger.record(row))
    return row.id


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/models", "models"),
        ("/models?offset=0&limit=500", "models"),
        ("/models?q=nothing+of+the+kind", "models"),
        ("/models/user", "models"),
        ("/models/count", "models_count"),
        ("/model/me/tiny", "model"),
        ("/models/me/tiny/endpoints", "endpoints"),
        ("/providers", "providers"),
        ("/key", "key"),
        ("/auth/key", "key"),
        ("/credits", "credits"),
    ],
)
def test_every_answer_is_what_the_official_schema_says(house: House, path: str, root: str) -> None:
    answer = house.get(path)

    assert answer.status == 200
    check(answer.json, root)
    assert answer.headers["content-type"] == "application/json"


def test_the_newest_clients_find_the_keys_that_the_schemas_do_not_have_yet(house: House) -> None:
    key, endpoint = house.get("/key").data, house.get("/endpoints/zdr").data[2]

    newest = {"allowed_data_regions", "budgets", "effective_budget", "free_model_daily_requests"}
    assert newest | {"organization_id", "workspace_id", "expires_at"} <= set(key)
    assert {"native_tools", "service_tier", "supports_diarization"} <= set(endpoint)
    assert endpoint["supports_tool_choice"] == dict.fromkeys(
        ("auto", "function", "none", "required"), True
    )


@pytest.mark.parametrize("path", OF_MODELS)
def test_of_models_everybody_is_told_under_both_prefixes(house: House, path: str) -> None:
    answers = [
        house.get(path + end, key="", prefix=prefix)
        for prefix in ("/api/v1", "/v1")
        for end in ("", "/")
    ]

    assert [answer.status for answer in answers] == [200] * 4
    assert len({answer.body for answer in answers}) == 1
    assert answers[0].data


@pytest.mark.parametrize("path", OF_KEYS)
def test_of_a_key_only_its_holder_is_told(house: House, path: str) -> None:
    missing, wrong, right = (house.get(path, key) for key in ("", "sk-or-v1-no", house.key))

    assert (missing.status, wrong.status) == (401, 401)
    assert missing.error["metadata"] == {"error_type": "authentication"}
    check(missing.json, "error_401")
    assert right.status in (200, 404)


def test_a_route_that_is_none_is_a_404_and_another_method_a_405(house: House) -> None:
    paths = ["/api/v1/none", "/", "/v1", "/api/v1/models/tiny/endpoints", "/models", "/model/a/b/c"]
    for path in paths:
        answer = asyncio.run(house.ask("GET", path))
        assert (answer.status, answer.error["code"]) == (404, 404)
        assert f"{path} is not a route" in answer.error["message"]
        check(answer.json, "error_404")

    assert asyncio.run(house.ask("POST", "/v1/models")).error["message"] == (
        "/v1/models takes GET, not POST"
    )
    assert asyncio.run(house.ask("GET", "/v1/chat/completions")).status == 405
    assert asyncio.run(house.ask("HEAD", "/v1/chat/completions")).status == 405


def test_the_pages_of_the_list_have_every_model_once(house: House) -> None:
    path, pages = "/models?limit=2&sort=context-high-to-low&q=", []
    while path:
        pages.append(house.get(path, prefix="" if pages else "/api/v1").json)
        path = pages[-1]["links"]["next"]

    slugs = [[model["id"] for model in page["data"]] for page in pages]
    assert slugs == [["you/Large", "me/tiny"], ["me/tiny-tuned"]]
    assert {page["total_count"] for page in pages} == {3}
    assert house.get("/models?limit=3").json["links"] == {"next": None}


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", ["tiny", "tiny-tuned", "Large"]),
        ("offset=2", ["Large"]),
        ("offset=9", []),
        ("limit=1000", ["tiny", "tiny-tuned", "Large"]),
        ("sort=newest", ["tiny-tuned", "tiny", "Large"]),
        ("sort=context-high-to-low", ["Large", "tiny", "tiny-tuned"]),
        ("sort=pricing-high-to-low", ["tiny", "tiny-tuned", "Large"]),
        ("sort=most-popular&limit=1", ["tiny"]),
        ("q=TUNED", ["tiny-tuned"]),
        ("q=you%2F", ["Large"]),
        ("context=1001", ["Large"]),
        ("supported_parameters=tools", ["tiny", "tiny-tuned", "Large"]),
        ("supported_parameters=tools,seed", ["Large"]),
        ("supported_parameters=top_a", []),
        ("output_modalities=all", ["tiny", "tiny-tuned", "Large"]),
        ("output_modalities=image", []),
        ("output_modalities=image,text&q=large", ["Large"]),
        ("input_modalities=text", ["tiny", "tiny-tuned", "Large"]),
        ("input_modalities=audio", []),
        ("model_authors=You,others", ["Large"]),
        ("max_price=0", ["tiny", "tiny-tuned", "Large"]),
        ("min_price=0.01", []),
        ("nothing=1&use_rss=true&category=programming&q=large", ["Large"]),
    ],
)
def test_a_query_finds_the_models_that_it_describes(
    house: House, query: str, found: list[str]
) -> None:
    answer = house.get(f"/models?{query}").json

    assert [model["name"] for model in answer["data"]] == found
    if "limit" not in query and "offset" not in query:
        assert answer["total_count"] == len(found)
        assert house.get(f"/models/count?{query}").data == {"count": len(found)}
        assert answer["links"] == {"next": None}


@pytest.mark.parametrize(
    "query", ["sort=best", "limit=0", "limit=1001", "limit=a", "offset=-1", "max_price=nan"]
)
def test_a_query_that_cannot_be_followed_is_a_400_that_names_it(house: House, query: str) -> None:
    answer = house.get(f"/models?{query}")

    assert answer.status == 400
    assert answer.error["message"].startswith(query.partition("=")[0] + ": ")
    check(answer.json, "error_400")


@pytest.mark.parametrize("form", ["/model/{}", "/models/{}/endpoints"])
def test_a_path_may_name_a_model_as_a_request_may(house: House, form: str) -> None:
    for name in ("me/tiny", "ME/Tiny", "me/tiny:thinking", "me/tiny:nitro", "~me/tiny-latest"):
        wanted = "me/tiny-tuned" if "latest" in name else "me/tiny"
        assert house.get(form.format(name)).data["id"] == wanted

    unknown, free = house.get(form.format("me/none")), house.get(form.format("me/tiny:free"))
    online = house.get(form.format("me/tiny:online"))
    assert (unknown.status, free.status, online.status) == (404, 404, 404)
    assert unknown.error["availability"]["requested_models"] == ["me/none"]
    assert free.error["availability"]["fallback_models"] == ["me/tiny"]
    check(unknown.json, "error_404")


def test_an_endpoint_whose_engine_has_died_says_so(house: House) -> None:
    assert house.get("/models/me/tiny/endpoints").data["endpoints"][0]["status"] == 0

    asyncio.run(house.engines[0].close())

    assert house.get("/models/me/tiny/endpoints").data["endpoints"][0]["status"] < 0
    assert [end["status"] < 0 for end in house.get("/endpoints/zdr").data] == [True, True, False]


def test_a_generation_is_told_to_its_key_alone(house: House) -> None:
    assert house.app.keys is not None
    other = house.app.keys.create("other")
    mine, nobodys = record(house), record(house, id="gen-2", key_id=None)

    answer = house.get(f"/generation?id={mine}")

    check(answer.json, "generation")
    told = answer.data
    assert (told["id"], told["model"], told["created_at"]) == (
        mine,
        "local/golden",
        "2026-01-01T00:00:00.123Z",
    )
    assert (told["tokens_prompt"], told["native_tokens_completion"]) == (24, 90)
    assert (told["native_tokens_reasoning"], told["native_tokens_cached"]) == (60, 16)
    assert (told["streamed"], told["cancelled"], told["external_user"]) == (True, True, "somebody")
    assert (told["latency"], told["generation_time"], told["total_cost"]) == (1000, 900, 5)
    assert {"request_id", "session_id", "response_cache_source_id"} <= set(told)
    for key, name in ((other, mine), (house.key, nobodys), (house.key, "gen-3")):
        refused = house.get(f"/generation?id={name}", key)
        assert (refused.status, refused.error["message"]) == (404, f"Generation {name} not found")


def test_no_content_is_kept_and_an_id_must_be_sent(house: House) -> None:
    kept = house.get(f"/generation/content?id={record(house)}")

    assert (kept.status, kept.error["metadata"]["error_type"]) == (404, "not_found")
    assert kept.error["message"].endswith("is not stored")
    assert house.get("/generation/content?id=gen-3").status == 404
    assert house.get("/generation").status == house.get("/generation?id=").status == 400


def test_a_stream_can_be_looked_up_as_soon_as_it_has_ended(serving: Any, books: Engine) -> None:
    keys = Keys(books)
    headers = {"Authorization": f"Bearer {keys.create('mine')}"}
    with (
        closing(Ledger(books)) as ledger,
        serving(ScriptedEngine(), keys=keys, ledger=ledger) as base,
        closing(http.client.HTTPConnection(urlsplit(base).netloc, timeout=10)) as connection,
    ):
        body = json.dumps({"messages": MESSAGES, "stream": True})
        connection.request("POST", "/v1/chat/completions", body, headers)
        reply = connection.getresponse()
        reply.read()
        name = reply.headers["X-Generation-Id"]
        connection.request("GET", f"/v1/generation?id={name}", headers=headers)
        told = json.loads(connection.getresponse().read())["data"]

    assert (told["id"], told["model"], told["finish_reason"]) == (name, "local/tiny", "stop")
    assert (told["streamed"], told["cancelled"]) == (True, False)


def test_activity_is_what_a_key_has_asked_of_each_model_on_days_that_are_over(house: House) -> None:
    noon = datetime.datetime.now(datetime.UTC).replace(hour=12)

    def ago(days: int) -> int:
        return int((noon - datetime.timedelta(days=days)).timestamp() * 1000)

    rows = [("a", 1), ("a", 1), ("b", 1), ("a", 30), ("a", 31), ("a", 0)]
    for number, (model, days) in enumerate(rows):
        record(house, id=f"gen-{number}", model=model, created_ms=ago(days))
    record(house, id="gen-of-nobody", key_id=None, created_ms=ago(1))

    items = house.get("/activity").data
    yesterday = (noon - datetime.timedelta(days=1)).date().isoformat()
    of_day = house.get(f"/activity?date={yesterday}").data

    assert [(item["model"], item["requests"]) for item in items] == [("a", 2), ("b", 1), ("a", 1)]
    assert of_day == items[:2]
    assert items[0] == {
        "date": yesterday,
        "model": "a",
        "model_permaslug": "a",
        "endpoint_id": "a",
        "provider_name": "Elsewhere",
        "usage": 10,
        "byok_usage_inference": 0,
        "requests": 2,
        "prompt_tokens": 48,
        "completion_tokens": 180,
        "reasoning_tokens": 120,
        "cached_tokens": 32,
    }
    for wrong in ("yesterday", noon.date().isoformat(), "2020-01-01", "2026-13-01"):
        refused = house.get(f"/activity?date={wrong}")
        assert (refused.status, refused.error["message"][:6]) == (400, "date: ")


ODD = st.text(max_size=20) | st.sampled_from(["local/tiny", "a/b:free", "~a/b-latest", "9" * 5000])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([*OF_MODELS, *OF_KEYS, "/model/{}", "/models/{}/endpoints", "/{}"]),
    words=st.lists(ODD, min_size=2, max_size=2),
    name=st.sampled_from([*ModelsQuery.model_fields, "id", "date", "other"]),
)
def test_whatever_is_asked_gets_json(house: House, path: str, words: list[str], name: str) -> None:
    query = urlencode({name: words[1]})
    answer = house.get(f"{path.partition('?')[0].format(words[0])}?{query}")

    assert answer.status in (200, 400, 404)
    assert ("error" in answer.json) == (answer.status != 200)


def test_no_model_embeds(house: House) -> None:
    refused = house.post("/embeddings", {"model": "me/tiny", "input": "hi"})

    assert (refused.status, refused.error["http_status"]) == (400, 400)
    availability = refused.error["availability"]
    assert (availability["code"], availability["requested_models"]) == (
        "wrong_endpoint",
        ["me/tiny"],
    )
    assert availability["constraint"]["field"] == "model"
    check(refused.json, "error_400")
    unknown = house.post("/embeddings", {"model": "me/none", "input": "hi"})
    assert unknown.error["availability"]["code"] == "model_not_found"
    for body in (b"{", b"[]", b'{"model": 1}'):
        assert house.post("/embeddings", body).status == 400
    assert asyncio.run(house.ask("POST", "/v1/embeddings", body=b"{}")).status == 401


@pytest.mark.parametrize(
    ("asked", "status", "code", "retryable"),
    [
        ({"model": "me/none"}, 400, "model_not_found", False),
        ({"model": "me/tiny:free"}, 404, "free_variant_ended", False),
        ({"model": "me/tiny:extended"}, 404, "no_endpoints", False),
        ({"model": "me/tiny", "modalities": ["image"]}, 404, "no_endpoints", False),
        ({"model": "me/tiny"}, 503, "temporarily_unavailable", True),
    ],
)
def test_what_cannot_be_had_says_whether_to_ask_again(
    house: House, asked: dict[str, Any], status: int, code: str, retryable: bool
) -> None:
    house.app.catalog.is_draining = status == 503

    answer = house.post("/chat/completions", {"messages": MESSAGES, **asked})

    assert (answer.status, answer.error["code"], answer.error["http_status"]) == (status,) * 3
    assert answer.error["error_type"] == answer.error["metadata"]["error_type"]
    availability = answer.error["availability"]
    assert (availability["code"], availability["retryable"]) == (code, retryable)
    assert availability["requested_models"] == [asked["model"]]
    assert availability["docs_url"].startswith("https://")
    assert availability.get("retry_after") == (1 if retryable else None)
    assert answer.headers.get("retry-after") == ("1" if retryable else None)


def test_while_the_server_stops_the_models_are_still_told(house: House) -> None:
    house.app.catalog.is_draining = True

    assert {house.get(path).status for path in OF_MODELS} == {200}


def test_a_variant_is_answered_by_the_model_itself(house: House) -> None:
    body = {"messages": MESSAGES, "model": "ME/tiny:thinking"}
    prompts = []
    for reasoning in ({}, {"reasoning": {"enabled": True}}, {"reasoning": {"enabled": False}}):
        answer = house.post("/chat/completions", body | reasoning)
        assert (answer.status, answer.json["model"]) == (200, "me/tiny")
        prompts.append(house.engines[0].asked[-1][0])

    assert prompts[0] == prompts[1] != prompts[2]


def test_a_page_of_any_site_may_ask(serving: Any) -> None:
    with (
        serving(ScriptedEngine()) as base,
        closing(http.client.HTTPConnection(urlsplit(base).netloc, timeout=10)) as connection,
    ):

        def ask(method: str, path: str, body: str | None = None) -> tuple[Any, bytes]:
            connection.request(method, path, body)
            answer = connection.getresponse()
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
            assert "X-Generation-Id" in answer.headers["Access-Control-Expose-Headers"]
            return answer, answer.read()

        for path in ("/api/v1/chat/completions", "/v1/key", "/nowhere"):
            before, nothing = ask("OPTIONS", path)
            assert (before.status, nothing) == (204, b"")
            assert "POST" in before.headers["Access-Control-Allow-Methods"]
            assert "Authorization" in before.headers["Access-Control-Allow-Headers"]
        stream = json.dumps({"messages": MESSAGES, "stream": True})
        assert ask("POST", "/v1/chat/completions", stream)[0].status == 200
        assert ask("GET", "/nowhere")[0].status == 404
        whole = ask("GET", "/v1/models")
        head, nothing = ask("HEAD", "/v1/models")
        assert (head.status, nothing) == (200, b"")
        assert head.headers["Content-Length"] == str(len(whole[1]))
