"""Keys over HTTP: who manages them, and what official clients read of the answers."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from books import generation
from inside import Answer, ask
from scripted import ScriptedEngine
from sqlalchemy import Engine

from pipeline.chat import Chat
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys, hash_key
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.offer.catalog import Catalog, Served

# Of the official Python client's own models.
SCHEMAS = json.loads((Path(__file__).parent / "openrouter_key_schemas.json").read_text("utf-8"))
ROUTES = [
    ("GET", "/keys"),
    ("POST", "/keys"),
    ("GET", "/keys/{hash}"),
    ("PATCH", "/keys/{hash}"),
    ("DELETE", "/keys/{hash}"),
]
TB = 10**12
"""Pico-dollars in a dollar."""


@dataclass
class House:
    """An application, its keys and its ledger, and a key that manages."""

    app: App
    keys: Keys
    ledger: Ledger
    manager: str

    def ask(
        self, method: str, path: str, body: Any = None, key: str = "", query: str = ""
    ) -> Answer:
        headers = {"Authorization": f"Bearer {key or self.manager}"}
        sent = b"" if body is None else json.dumps(body).encode()
        url = f"/api/v1{path}"
        return asyncio.run(ask(self.app, method, url, headers, sent, query.encode()))

    def create(self, **fields: Any) -> tuple[str, Any]:
        """A key's text, and what is told of it."""
        answer = self.ask("POST", "/keys", {"name": "team", **fields})
        assert answer.status == 201, answer.body
        check(answer.json, "keys_create")
        return answer.json["key"], answer.json["data"]

    def names(self, query: str = "") -> list[str]:
        answer = self.ask("GET", "/keys", query=query)
        check(answer.json, "keys_list")
        return [key["name"] for key in answer.json["data"]]

    def spend(self, key_id: int, usd: int, number: int) -> None:
        row = generation(number, key_id=key_id, cost_picodollars=usd * TB)
        asyncio.run(self.ledger.record(row))


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Engine]:
    with open_books(str(tmp_path)) as opened:
        yield opened


@pytest.fixture
def house(chat: Chat, books: Engine) -> Iterator[House]:
    keys = Keys(books, cache_s=3600)
    with closing(Ledger(books)) as ledger:
        app = App(Catalog([Served("tiny", chat, ScriptedEngine(), 1)]), keys, ledger)
        yield House(app, keys, ledger, keys.create("manager", is_management=True))


def check(body: Any, root: str) -> None:
    validator = jsonschema.Draft202012Validator(
        SCHEMAS["roots"][root], format_checker=jsonschema.FormatChecker()
    )
    validator.validate(body)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_only_a_management_key_manages(house: House, method: str, path: str) -> None:
    url = path.replace("{hash}", house.keys.all()[0].hash)
    ordinary = house.keys.create("ordinary")

    refused = house.ask(method, url, {"name": "x"}, ordinary)
    unknown = house.ask(method, url, {"name": "x"}, "sk-or-v1-no")

    assert (refused.status, unknown.status) == (403, 401)
    assert refused.json["error"]["message"] == "Only management keys can perform this operation"
    assert refused.json["error"]["metadata"] == {"error_type": "permission_denied"}
    assert len(house.keys.all()) == 2


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_server_without_keys_lets_nobody_manage_them(chat: Chat, method: str, path: str) -> None:
    app = App(Catalog([Served("tiny", chat, ScriptedEngine(), 1)]))

    assert asyncio.run(ask(app, method, f"/v1{path}")).status == 403


def test_a_key_is_told_once_and_opens_at_once(house: House) -> None:
    text, told = house.create(
        name="laptop", limit=2.5, limit_reset="weekly", expires_at="2099-01-01T00:00:00Z"
    )

    assert told["hash"] == hash_key(text)
    assert (told["limit"], told["limit_remaining"], told["limit_reset"]) == (2.5, 2.5, "weekly")
    assert (told["label"], told["disabled"]) == (f"sk-or-v1-{text[9:12]}...{text[-3:]}", False)
    assert told["expires_at"] == "2099-01-01T00:00:00.000Z"
    assert house.ask("GET", "/key", key=text).json["data"]["limit"] == 2.5
    one = house.ask("GET", f"/keys/{told['hash']}/")
    check(one.json, "keys_one")
    assert one.json["data"] == told
    everything = [house.ask("GET", path).body for path in ("/keys", f"/keys/{told['hash']}")]
    assert not any(text[9:].encode() in body for body in everything)


def test_a_key_of_its_own_limits_says_them(house: House) -> None:
    limits: dict[str, Any] = {
        "requests_per_minute": 1,
        "tokens_per_minute": 2,
        "streams": 3,
        "models": ["a/b"],
    }
    limits["priority"] = "high"

    _, told = house.create(**limits)

    assert {name: told[name] for name in limits} == limits


def test_whose_content_is_logged_is_told_and_changed(house: House) -> None:
    _, silent = house.create()
    _, told = house.create(log_content=True)
    url = f"/keys/{told['hash']}"

    assert (silent["log_content"], told["log_content"]) == (False, True)
    assert house.ask("PATCH", url, {"limit": 1}).json["data"]["log_content"] is True
    assert house.ask("PATCH", url, {"log_content": False}).json["data"]["log_content"] is False


def test_the_list_has_what_is_asked_for(house: House) -> None:
    for number in range(3):
        house.create(name=f"key {number}")
    house.create(name="disabled", disabled=True)
    house.keys.create("expired", {"expires_ms": 1})

    usual = ["manager", "key 0", "key 1", "key 2"]
    assert house.names() == usual
    assert house.names("include_disabled=true") == [*usual, "disabled"]
    assert house.names("include_expired=true&include_disabled=false") == [*usual, "expired"]
    assert house.names("offset=1&limit=2") == ["key 0", "key 1"]
    assert house.names("offset=9") == []
    for wrong in ("offset=-1", "limit=0", "limit=101", "include_disabled=perhaps"):
        refused = house.ask("GET", "/keys", query=wrong)
        assert refused.status == 400
        assert refused.json["error"]["message"].startswith(wrong.partition("=")[0] + ": ")


def test_what_is_changed_holds_at_once_and_the_rest_stays(house: House) -> None:
    text, told = house.create(limit=1, limit_reset="daily", models=["a/b"])
    assert house.ask("GET", "/key", key=text).status == 200
    url = f"/keys/{told['hash']}"

    limited = house.ask("PATCH", url, {"limit": 3, "limit_reset": None, "name": "renamed"})
    check(limited.json, "keys_update")
    now = limited.json["data"]

    assert (now["limit"], now["limit_reset"], now["name"]) == (3, None, "renamed")
    assert (now["models"], now["updated_at"] >= now["created_at"]) == (["a/b"], True)
    assert house.ask("PATCH", url, {"limit": None}).json["data"]["limit"] is None
    assert house.ask("PATCH", url, {"disabled": True}).json["data"]["disabled"]
    assert house.ask("GET", "/key", key=text).status == 401
    assert house.ask("PATCH", url, {"disabled": False}).status == 200
    assert house.ask("GET", "/key", key=text).status == 200


def test_a_deleted_key_is_gone_and_what_it_cost_is_not(house: House) -> None:
    text, told = house.create()
    house.spend(house.keys.all()[-1].id, 3, 1)
    url = f"/keys/{told['hash']}"

    deleted = house.ask("DELETE", url)

    check(deleted.json, "keys_delete")
    assert (deleted.status, deleted.json) == (200, {"deleted": True})
    assert [house.ask(m, url, {}).status for m in ("GET", "PATCH", "DELETE")] == [404] * 3
    assert house.ask("GET", "/key", key=text).status == 401
    assert house.names("include_disabled=true") == ["manager"]
    assert house.ask("GET", "/credits").json["data"]["total_usage"] == 3


def test_who_manages_is_told_of_every_keys_spending(house: House) -> None:
    text, told = house.create(limit=10)
    mine, others = house.keys.all()[-1].id, house.keys.all()[0].id
    house.spend(mine, 4, 1)
    house.spend(others, 2, 2)

    credit = house.ask("GET", "/credits").json["data"]["total_usage"]
    of_one = house.ask("GET", "/credits", key=text).json["data"]["total_usage"]
    now = house.ask("GET", f"/keys/{told['hash']}").json["data"]

    assert (credit, of_one) == (6, 4)
    assert (now["usage"], now["limit_remaining"]) == (4, 6)
    assert now["last_used_at"] == "2026-01-01T00:00:00.123Z"
    listed = house.ask("GET", "/keys").json["data"]
    assert [key["usage"] for key in listed] == [2, 4]


def test_a_key_is_told_the_truth_about_itself(house: House) -> None:
    text, _ = house.create(limit=10, limit_reset="monthly", expires_at="2099-01-01T00:00:00Z")

    mine = house.ask("GET", "/key", key=text).json["data"]
    manager = house.ask("GET", "/key").json["data"]

    assert (mine["limit"], mine["limit_remaining"], mine["limit_reset"]) == (10, 10, "monthly")
    assert mine["expires_at"] == "2099-01-01T00:00:00.000Z"
    assert (mine["is_management_key"], mine["is_provisioning_key"]) == (False, False)
    assert (manager["is_management_key"], manager["is_provisioning_key"]) == (True, True)
    assert (manager["limit"], manager["limit_remaining"]) == (None, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", " "),
        ("name", None),
        ("name", "two\nlines"),
        ("limit", -1),
        ("limit", "5"),
        ("limit", 10**9),
        ("limit", True),
        ("limit_reset", "hourly"),
        ("streams", 0),
        ("requests_per_minute", 1.5),
        ("models", ["no slug"]),
        ("expires_at", "soon"),
        ("expires_at", "2020-01-01T00:00:00Z"),
        ("expires_at", 1),
        ("disabled", "no"),
        ("log_content", "yes"),
    ],
)
def test_a_field_that_is_wrong_is_named(house: House, field: str, value: Any) -> None:
    for method, path in (("POST", "/keys"), ("PATCH", f"/keys/{house.keys.all()[0].hash}")):
        refused = house.ask(method, path, {"name": "x", field: value})
        assert refused.status == 400, refused.body
        assert refused.json["error"]["message"].startswith(field)
    assert len(house.keys.all()) == 1


def test_another_method_is_told_which_there_are(house: House) -> None:
    refused = house.ask("PUT", "/keys")

    assert (refused.status, refused.json["error"]["message"]) == (
        405,
        "/api/v1/keys takes GET or POST, not PUT",
    )
