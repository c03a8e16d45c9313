"""Which model answers, from where, on which conditions, and what is told of the way there."""

import asyncio
import http.client
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from asking import Response
from running import running
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.engine.protocol import Delta
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.offer.catalog import Catalog, Served, Upstream
from pipeline.serve.offer.door import Door
from pipeline.serve.offer.price import Price

USER = {"role": "user", "content": "hi"}
ABLE = ("top_k", "seed", "grammar")
PRICE = Price(prompt=50_000, completion=400_000, cached=20_000, request=7)


class Answer(Response):
    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def content(self) -> str:
        return str(self.json["choices"][0]["message"]["content"])


def ask(base: str, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
    path = fields.pop("path", "/api/v1/chat/completions")
    body = {"messages": [USER], "reasoning": {"enabled": False}, **fields}
    with closing(http.client.HTTPConnection(urlsplit(base).netloc, timeout=10)) as connection:
        connection.request("POST", path, json.dumps(body), headers or {})
        return Answer(connection.getresponse())


def get(base: str, path: str, headers: dict[str, str]) -> Any:
    with closing(http.client.HTTPConnection(urlsplit(base).netloc, timeout=10)) as connection:
        connection.request("GET", "/api/v1" + path, headers=headers)
        return json.loads(connection.getresponse().read())


@contextmanager
def house(chat: Chat, *models: Served, **others: Any) -> Iterator[str]:
    presets = others.pop("presets", {})
    with running(App(Catalog(models, presets), **others)) as base:
        yield base


def named(chat: Chat, name: str, engine: ScriptedEngine | None = None, **fields: Any) -> Served:
    return Served(name, chat, engine or ScriptedEngine([name], able=ABLE), 1767225600, **fields)


def test_the_next_model_answers_where_the_first_cannot(chat: Chat) -> None:
    dead = named(chat, "dead", ScriptedEngine(fails_at=0))
    with house(chat, dead, named(chat, "well")) as base:
        wanted = {"X-OpenRouter-Metadata": "Enabled"}
        whole = ask(base, wanted, model="local/dead", models=["local/dead", "local/well"])
        stream = ask(base, wanted, models=["nobody/knows", "local/dead", "well"], stream=True)
        alone = ask(base, model="local/dead")

    assert (whole.status, whole.json["model"], whole.content) == (200, "local/well", "well")
    told = whole.json["openrouter_metadata"]
    assert told["strategy"] == "fallback"
    assert told["requested"] == "local/dead"
    assert told["attempt"] == 2
    assert [(a["model"], a["status"]) for a in told["attempts"]] == [
        ("local/dead", 502),
        ("local/well", 200),
    ]
    assert [a["selected"] for a in told["endpoints"]["available"]] == [False, True]
    assert {chunk["model"] for chunk in stream.chunks} == {"local/well"}
    assert stream.chunks[-1]["openrouter_metadata"]["attempt"] == 2
    assert alone.status == 502


def test_the_last_failure_is_told_where_every_model_fails(chat: Chat) -> None:
    dead = named(chat, "dead", ScriptedEngine(fails_at=0))
    with house(chat, dead) as base:
        engine_last = ask(base, models=["nobody/knows", "local/dead"])
        unknown = ask(base, models=["nobody/knows", "nobody/else"])
        told = ask(base, {"X-OpenRouter-Metadata": "enabled"}, model="dead")

    assert engine_last.status == 502
    assert (unknown.status, unknown.error["message"]) == (
        400,
        "nobody/else is not a valid model ID",
    )
    assert unknown.error["availability"]["requested_models"] == ["nobody/knows", "nobody/else"]
    assert told.json["openrouter_metadata"]["attempts"][0]["status"] == 502
    assert "openrouter_metadata" not in unknown.json


def test_a_request_too_long_for_one_model_goes_to_the_next(chat: Chat) -> None:
    small = ScriptedEngine(["small"])
    small.context_tokens = 20
    with house(chat, named(chat, "small", small), named(chat, "large")) as base:
        alone = ask(base, model="small", messages=[{"role": "user", "content": "x" * 50}])
        both = ask(
            base, models=["small", "large"], messages=[{"role": "user", "content": "x" * 50}]
        )

    assert alone.error["metadata"]["error_type"] == "context_length_exceeded"
    assert both.content == "large"


@pytest.mark.parametrize(
    "provider",
    [
        {},
        {"only": ["pipeline"]},
        {"only": ["Pipeline/bf16", "acme"]},
        {"ignore": ["acme", "pipeline/fp8"]},
        {"order": ["acme"]},
        {"order": ["pipeline"], "allow_fallbacks": False},
        {"quantizations": ["fp8", "bf16"]},
        {"max_price": {"prompt": 0.05, "completion": "0.4"}},
        {"max_price": {"prompt": "0.06"}},
        {"data_collection": "deny", "zdr": True},
        {"require_parameters": True},
        {"sort": "price"},
        {"sort": {"by": "throughput", "partition": "none"}},
        {"preferred_max_latency": 0.001, "preferred_min_throughput": {"p50": 1e9}},
    ],
)
def test_preferences_that_the_server_meets_are_met(chat: Chat, provider: Any) -> None:
    model = named(chat, "well", price=PRICE, quantization="bf16")
    with house(chat, model) as base:
        answer = ask(base, provider=provider, top_k=5)
    assert (answer.status, answer.headers["X-Ignored-Parameters"]) == (200, None)


@pytest.mark.parametrize(
    ("provider", "code", "excluded_by"),
    [
        ({"only": ["acme"]}, "no_endpoints", "allowed_providers"),
        ({"only": []}, "no_endpoints", "allowed_providers"),
        ({"ignore": ["pipeline"]}, "no_endpoints", "allowed_providers"),
        ({"order": ["acme"], "allow_fallbacks": False}, "no_endpoints", "allowed_providers"),
        ({"quantizations": ["int4"]}, "constraint_filtered", "quantization"),
        ({"max_price": {"prompt": 0.049}}, "constraint_filtered", "max_price"),
        ({"max_price": {"completion": "0.39"}}, "constraint_filtered", "max_price"),
        ({"max_price": {"request": 0}}, "constraint_filtered", "max_price"),
        ({"require_parameters": True}, "constraint_filtered", "require_parameters"),
    ],
)
def test_preferences_that_nothing_here_meets_are_a_404_that_says_which(
    chat: Chat, provider: Any, code: str, excluded_by: str
) -> None:
    model = named(chat, "well", price=PRICE, quantization="bf16")
    with house(chat, model) as base:
        answer = ask(base, provider=provider, min_p=0.1)
    assert answer.status == 404
    assert answer.error["availability"]["code"] == code
    assert answer.error["availability"]["excluded_by"] == [excluded_by]


def test_a_preference_nobody_knows_is_named_and_a_wrong_one_refused(chat: Chat) -> None:
    with house(chat, named(chat, "well")) as base:
        unknown = ask(base, provider={"moon": "full"})
        wrong = ask(base, provider={"quantizations": ["int3"]})
        negative = ask(base, provider={"max_price": {"prompt": -1}})
    assert unknown.headers["X-Ignored-Parameters"] == "provider.moon"
    assert wrong.status == 400
    assert wrong.error["message"].startswith("provider.quantizations.0:")
    assert negative.status == 400


def test_the_cheapest_model_answers_where_the_order_matters_less(chat: Chat) -> None:
    dear, cheap = named(chat, "dear", price=PRICE), named(chat, "cheap", price=Price(prompt=1))
    with house(chat, dear, cheap) as base:
        both = {"models": ["dear", "cheap"]}
        in_order = ask(base, **both, provider={"sort": "price"})
        cheapest = ask(base, **both, provider={"sort": {"by": "price", "partition": "none"}})
    assert (in_order.content, cheapest.content) == ("dear", "cheap")


def test_a_reply_costs_what_its_tokens_cost_and_the_books_say_the_same(
    chat: Chat, tmp_path: Path
) -> None:
    broken = named(chat, "broken", ScriptedEngine(["a", "b"], fails_at=1), price=PRICE)
    with open_books(str(tmp_path)) as books, closing(Ledger(books)) as ledger:
        keys = Keys(books)
        key = {"Authorization": f"Bearer {keys.create('team')}"}
        with house(
            chat, named(chat, "well", price=PRICE), broken, keys=keys, ledger=ledger
        ) as base:
            whole = ask(base, key, n=2)
            stream = ask(base, key, stream=True)
            failed = ask(base, key, model="broken")
        for answer in (whole.json, stream.chunks[-1]):
            usage = answer["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            prompt = 7 + (usage["prompt_tokens"] - cached) * 50_000 + cached * 20_000
            completion = usage["completion_tokens"] * 400_000
            assert usage["cost"] == (prompt + completion) / 10**12 > 0
            details = usage["cost_details"]
            assert details["upstream_inference_prompt_cost"] == prompt / 10**12
            assert details["upstream_inference_completions_cost"] == completion / 10**12
            row = asyncio.run(ledger.find(answer["id"]))
            assert row is not None
            assert row.cost_picodollars == prompt + completion
            assert row.price_version == "50000/400000/20000/7"
        with house(chat, named(chat, "well"), keys=keys, ledger=ledger) as base:
            told = [get(base, path, key)["data"] for path in ("/key", "/credits")]
        sum_usd = sum(a["usage"]["cost"] for a in (whole.json, stream.chunks[-1]))
        assert told[0]["usage"] == told[0]["usage_daily"] == pytest.approx(sum_usd, abs=1e-15)
        assert told[1]["total_usage"] == told[0]["usage"]
        assert failed.json["choices"][0]["finish_reason"] == "error"
        assert failed.json["usage"]["cost"] == 0


def test_a_full_engine_turns_away_at_once_and_another_model_may_answer(chat: Chat) -> None:
    slow = named(chat, "slow", ScriptedEngine(["a"] * 50, delay_s=0.02), door=Door(1))
    with house(chat, slow, named(chat, "well")) as base:
        running_one = threading.Thread(target=ask, args=(base,), kwargs={"model": "slow"})
        running_one.start()
        while not slow.door.num_inside:
            pass
        full = ask(base, model="slow")
        instead = ask(base, models=["slow", "well"])
        running_one.join()
        again = ask(base, model="slow", max_tokens=1)

    assert full.status == 429
    assert len(slow.engine.asked) == 2, "nothing is asked for who is turned away"
    assert full.headers["Retry-After"] == "1"
    told = full.error["metadata"]["headers"]
    assert (told["X-RateLimit-Limit"], told["X-RateLimit-Remaining"]) == ("1", "0")
    assert {name: full.headers[name] for name in told} == told
    availability = full.error["availability"]
    assert (availability["code"], availability["retryable"]) == ("capacity_exhausted", True)
    assert availability["retry_after"] == 1
    assert instead.content == "well"
    assert again.status == 200
    assert slow.door.num_inside == 0


def test_a_preset_fills_what_the_request_leaves_open(chat: Chat) -> None:
    engine = ScriptedEngine(["ok"], able=ABLE)
    presets = {
        "careful": {"model": "local/well", "temperature": 0.1, "top_k": 3, "system": "Be brief."}
    }
    other = named(chat, "other")
    wanted = {"X-OpenRouter-Metadata": "enabled"}
    with house(chat, other, named(chat, "well", engine), presets=presets) as base:
        as_model = ask(base, wanted, model="@preset/careful")
        beside = ask(base, model="other@preset/careful")
        as_field = ask(base, preset="careful", temperature=0.9)
        spoken = [{"role": "system", "content": "Be long."}, USER]
        own_system = ask(base, preset="careful", messages=spoken)
        unknown = ask(base, model="@preset/careless")

    assert [answer.json["model"] for answer in (as_model, beside, as_field)] == [
        "local/well",
        "local/other",
        "local/well",
    ]
    (prompt, first), (_, second), (long_prompt, _) = engine.asked
    assert (first.temperature, first.top_k) == (0.1, 3)
    assert (second.temperature, second.top_k) == (0.9, 3)
    assert "Be brief." in chat.decode(prompt)
    assert "Be brief." not in chat.decode(long_prompt)
    assert own_system.status == 200
    assert as_model.json["openrouter_metadata"]["requested"] == "@preset/careful"
    assert unknown.status == 404
    assert "careless" in unknown.error["message"]


def test_a_stream_shows_what_the_engine_was_asked_if_that_is_wanted(chat: Chat) -> None:
    with house(chat, named(chat, "well")) as base:
        shown = ask(base, stream=True, debug={"echo_upstream_body": True}, temperature=0.25)
        plain = ask(base, stream=True)
        whole = ask(base, debug={"echo_upstream_body": True})
    first = shown.chunks[0]
    assert first["choices"] == []
    assert first["debug"]["echo_upstream_body"]["temperature"] == 0.25
    assert "<|im_start|>user\nhi" in first["debug"]["echo_upstream_body"]["prompt"]
    assert not any("debug" in chunk for chunk in [*shown.chunks[1:], *plain.chunks, whole.json])


def test_requests_of_one_session_share_a_lane_and_keys_share_no_cache(
    chat: Chat, tmp_path: Path
) -> None:
    engine = ScriptedEngine(["ok"])
    with open_books(str(tmp_path)) as books:
        keys = Keys(books)
        one, two = ({"Authorization": f"Bearer {keys.create(name)}"} for name in "ab")
        with house(chat, named(chat, "well", engine), keys=keys) as base:
            ask(base, {**one, "X-Session-Id": "header"}, session_id="body")
            ask(base, {**one, "X-Session-Id": "header"})
            ask(base, one, prompt_cache_key="key")
            ask(base, two)
    assert [lane.session for lane in engine.lanes] == ["body", "header", "key", ""]
    salts = [lane.cache_salt for lane in engine.lanes]
    assert salts[0] == salts[1] == salts[2] != salts[3]
    assert all(salts)


def long_dialogue(num_turns: int) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": "sys"}]
    for number in range(num_turns):
        messages += [{"role": "user", "content": f"question {number}"}]
        messages += [{"role": "assistant", "content": f"answer {number}"}]
    return [*messages, {"role": "user", "content": "the last"}]


@pytest.mark.parametrize(("tokens", "is_short"), [(8192, True), (8193, False)])
def test_a_short_context_is_compressed_for_where_its_operator_says_so(
    chat: Chat, tokens: int, is_short: bool
) -> None:
    engine = ScriptedEngine(["ok"])
    engine.context_tokens = tokens
    messages = long_dialogue(300)
    with house(chat, named(chat, "well", engine, compress_short=True)) as base:
        by_default = ask(base, messages=messages)
        refused = ask(base, messages=messages, transforms=[])
        off = {"id": "context-compression", "enabled": False}
        switched_off = ask(base, messages=messages, plugins=[off])
        healed = ask(base, messages=messages, plugins=[{"id": "response-healing"}])

    assert (by_default.status, healed.status) == ((200, 200) if is_short else (400, 400))
    assert (refused.status, switched_off.status) == (400, 400)


def test_a_dialogue_that_is_too_long_loses_its_middle_if_that_is_wanted(chat: Chat) -> None:
    engine = ScriptedEngine(["ok"])
    engine.context_tokens = 400
    messages = long_dialogue(20)
    with house(chat, named(chat, "well", engine)) as base:
        refused = ask(base, messages=messages, max_tokens=100)
        off = {"id": "context-compression", "enabled": False}
        still = ask(base, messages=messages, plugins=[off], transforms=[])
        wanted = {"X-OpenRouter-Metadata": "enabled"}
        plugin = {"id": "context-compression"}
        fitted = ask(base, wanted, messages=messages, max_tokens=100, plugins=[plugin])
        old = ask(base, messages=messages, transforms=["middle-out"])
        short = ask(base, wanted, plugins=[plugin])

    assert refused.status == still.status == 400
    assert (fitted.status, old.status) == (200, 200)
    (prompt, sampling), *_ = engine.asked
    text = chat.decode(prompt)
    assert len(prompt) + sampling.max_tokens <= 400
    assert "sys" in text
    assert "the last" in text
    assert "question 0" in text
    assert "question 10" not in text
    stages = fitted.json["openrouter_metadata"]["pipeline"]
    assert [stage["type"] for stage in stages] == ["context_compression"]
    assert "pipeline" not in short.json["openrouter_metadata"]


def test_json_is_mended_if_that_is_wanted_and_it_was_not_cut_off(chat: Chat) -> None:
    engine = ScriptedEngine(["```json\n", "{'a': 1,", "}", "\n```"], able=ABLE)
    form = {"response_format": {"type": "json_object"}, "plugins": [{"id": "response-healing"}]}
    with house(chat, named(chat, "well", engine)) as base:
        mended = ask(base, {"X-OpenRouter-Metadata": "enabled"}, **form)
        as_it_is = ask(base, response_format={"type": "json_object"})
        stream = ask(base, **form, stream=True)
        cut = ask(base, **form, max_tokens=2)
        free = ask(base, plugins=form["plugins"])

    assert json.loads(mended.content) == {"a": 1}
    stages = mended.json["openrouter_metadata"]["pipeline"]
    assert [stage["type"] for stage in stages] == ["response_healing"]
    assert as_it_is.content == free.content == "```json\n{'a': 1,}\n```"
    said = [c["choices"][0]["delta"]["content"] for c in stream.chunks if c["choices"]]
    assert "".join(said) == as_it_is.content
    assert cut.content == "```json\n{'a': 1,"


def test_a_prompt_in_place_of_messages_is_continued_as_it_stands(chat: Chat) -> None:
    engine = ScriptedEngine(["<think>", " one", " two", " three"])
    with house(chat, named(chat, "well", engine)) as base:
        asked = {"messages": None, "reasoning": None, "prompt": "Count: zero", "stop": "thr"}
        whole = ask(base, **asked)
        stream = ask(base, **asked, stream=True)
        legacy = ask(base, **asked, path="/v1/completions/")
        nothing = ask(base, messages=None, prompt="")

    assert chat.decode(engine.asked[0][0]) == "Count: zero"
    for answer in (whole, legacy):
        assert answer.json["choices"][0]["text"] == "<think> one two "
        assert answer.json["choices"][0]["finish_reason"] == "stop"
    text = "".join(c["choices"][0]["text"] for c in stream.chunks if c["choices"])
    assert text == "<think> one two "
    assert whole.json["usage"]["completion_tokens"] == 4
    assert nothing.status == 400


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"session_id": "x" * 257}, "session_id"),
        ({"metadata": {"a[b]": "c"}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"plugins": [{"id": "web"}]}, "plugins.0"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"verbosity": "loud"}, "verbosity"),
        ({"route": "scenic"}, "route"),
        ({"debug": {"echo_upstream_body": "yes"}}, "debug.echo_upstream_body"),
        ({"top_a": 2}, "top_a"),
    ],
)
def test_what_is_out_of_its_bounds_is_refused_by_its_place(
    chat: Chat, fields: dict[str, Any], place: str
) -> None:
    with house(chat, named(chat, "well")) as base:
        answer = ask(base, **fields)
    assert answer.status == 400
    assert answer.error["message"].startswith(place)


def test_a_plugin_that_is_switched_off_need_not_be_there(chat: Chat) -> None:
    with house(chat, named(chat, "well")) as base:
        assert ask(base, plugins=[{"id": "web", "enabled": False}]).status == 200


def test_a_users_name_goes_before_what_the_user_says(chat: Chat) -> None:
    engine = ScriptedEngine(["ok"])
    parts = [{"type": "text", "text": "hello"}]
    messages = [{**USER, "name": "Ann"}, {"role": "user", "name": "Bob", "content": parts}]
    with house(chat, named(chat, "well", engine)) as base:
        answer = ask(base, messages=messages)
    prompt = chat.decode(engine.asked[0][0])
    assert "user\nAnn: hi<|im_end|>" in prompt
    assert "user\nBob: hello<|im_end|>" in prompt
    assert answer.headers["X-Ignored-Parameters"] is None


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({"enable_thinking": False}, False),
        ({"enable_thinking": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"thinking_budget": 0}, False),
        ({"thinking_budget": 5}, True),
    ],
)
def test_qwens_own_switches_for_thinking_are_understood(
    chat: Chat, fields: dict[str, Any], thinks: bool
) -> None:
    engine = ScriptedEngine(["<think>", "hm", "</think>", "\n\nyes"])
    with house(chat, named(chat, "well", engine)) as base:
        answer = ask(base, reasoning=None, **fields)
        torn = ask(base, reasoning={"enabled": not thinks}, **fields)
    prompt, sampling = engine.asked[0]
    assert chat.decode(prompt).endswith("</think>\n\n") is not thinks
    assert (sampling.max_tokens == 5) is (fields.get("thinking_budget") == 5)
    assert answer.headers["X-Ignored-Parameters"] is None
    assert torn.status == 400


def test_what_is_ignored_is_named_in_the_metadata_too(chat: Chat) -> None:
    with house(chat, named(chat, "well")) as base:
        answer = ask(base, {"X-OpenRouter-Metadata": "enabled"}, verbosity="low", moon="full")
        off = ask(base, {"X-OpenRouter-Metadata": "disabled"})
    assert answer.json["openrouter_metadata"]["params"] == {"ignored": ["verbosity", "moon"]}
    assert answer.headers["X-Ignored-Parameters"] == "verbosity, moon"
    assert "openrouter_metadata" not in off.json


def test_a_server_elsewhere_answers_while_the_engine_here_is_down_or_full(chat: Chat) -> None:
    theirs = ScriptedEngine(["<think>", "hm", "</think>", "\n\nfar"])
    there = Served("theirs", chat, theirs, 1767225600, price=PRICE, author="acme")
    with house(chat, there) as url:
        upstream = Upstream(f"{url}/api/v1", "", "acme/theirs", "Far Away")
        dead = named(chat, "dead", ScriptedEngine(fails_at=0), upstreams=(upstream,))
        full = named(chat, "full", door=Door(0), upstreams=(upstream,))
        well = named(chat, "well", upstreams=(upstream,))
        thinks = {"reasoning": None}
        with house(chat, dead, full, well) as base:
            stream = ask(base, {"X-OpenRouter-Metadata": "enabled"}, **thinks, stream=True)
            whole = ask(base, model="full", **thinks)
            here = ask(base, model="well", stream=True)
            asked_for = ask(base, model="well", provider={"only": ["far-away"]}, **thinks)
            barred = ask(base, model="dead", provider={"allow_fallbacks": False})
            private = ask(base, model="dead", provider={"data_collection": "deny"})
            wrong = ask(base, model="dead", messages=[{**USER, "role": "assistant"}] * 2, n=9)
            listed = get(base, "/models/local/dead/endpoints", {})["data"]["endpoints"]
            providers = get(base, "/providers", {})["data"]

    assert {chunk["provider"] for chunk in stream.chunks} == {"Far Away"}
    assert {chunk["model"] for chunk in stream.chunks} == {"local/dead"}
    told = stream.chunks[-1]["openrouter_metadata"]["attempts"]
    assert [(a["provider"], a["status"]) for a in told] == [("Pipeline", 502), ("Far Away", 200)]
    for answer in (whole, asked_for):
        assert answer.content == "far"
        assert answer.json["choices"][0]["message"]["reasoning"] == "hm"
        assert answer.json["provider"] == answer.headers["X-Provider-Name"] == "Far Away"
        usage = answer.json["usage"]
        assert usage["completion_tokens"] == 5
        assert usage["cost"] == stream.chunks[-1]["usage"]["cost"] > 0
    assert {chunk["provider"] for chunk in here.chunks} == {"Pipeline"}
    assert barred.status == private.status == 502
    assert wrong.status == 400
    assert [(e["tag"], e["provider_name"]) for e in listed] == [
        ("pipeline", "Pipeline"),
        ("far-away", "Far Away"),
    ]
    assert [provider["slug"] for provider in providers] == ["pipeline", "far-away"]


CACHED = {"X-OpenRouter-Cache": "true"}


def test_a_reply_is_told_again_for_nothing_to_a_client_that_wants_that(
    chat: Chat, tmp_path: Path
) -> None:
    engine = ScriptedEngine(["<think>", "hm", "</think>", "\n\nyes"])
    with open_books(str(tmp_path)) as books, closing(Ledger(books)) as ledger:
        keys = Keys(books)
        one, two = ({"Authorization": f"Bearer {keys.create(name)}"} for name in "ab")
        model = named(chat, "well", engine, price=PRICE)
        with house(chat, model, keys=keys, ledger=ledger) as base:
            wanted = {**one, **CACHED, "X-OpenRouter-Metadata": "enabled"}
            asked: dict[str, Any] = {"reasoning": None, "seed": 1}
            made, again = ask(base, wanted, **asked), ask(base, wanted, **asked)
            streams = [ask(base, wanted, **asked, stream=True) for _ in range(2)]
            others = [
                ask(base, {**two, **CACHED}, **asked),
                ask(base, one, **asked),
                ask(base, wanted, **{**asked, "seed": 2}),
                ask(base, {**wanted, "X-OpenRouter-Cache-Clear": "true"}, **asked),
            ]
        row = asyncio.run(ledger.find(again.json["id"]))

    assert len(engine.asked) == 1 + 1 + len(others)
    assert made.headers["X-OpenRouter-Cache-Status"] == "MISS"
    assert again.headers["X-OpenRouter-Cache-Status"] == "HIT"
    assert again.headers["X-OpenRouter-Cache-Source-Id"] == made.json["id"] != again.json["id"]
    assert 0 < int(again.headers["X-OpenRouter-Cache-TTL"]) <= 300
    assert again.json["choices"] == made.json["choices"]
    assert "openrouter_metadata" in made.json
    assert "openrouter_metadata" not in again.json
    usage = again.json["usage"]
    assert usage["total_tokens"] == usage["cost"] == usage["completion_tokens"] == 0
    assert row is not None
    assert (row.cache_source, row.cost_picodollars) == (made.json["id"], 0)
    first, second = (
        [chunk["choices"] for chunk in stream.chunks if chunk["choices"]] for stream in streams
    )
    assert first == second
    assert streams[1].headers["X-OpenRouter-Cache-Status"] == "HIT"
    status = [answer.headers["X-OpenRouter-Cache-Status"] for answer in others]
    assert status == ["MISS", None, "MISS", "MISS"]


def test_a_reply_that_broke_off_is_not_told_again(chat: Chat) -> None:
    engine = ScriptedEngine(["a", "b"], fails_at=1)
    with house(chat, named(chat, "well", engine)) as base:
        broken = ask(base, CACHED)
        engine.fails_at = None
        whole = ask(base, CACHED)
    assert broken.json["choices"][0]["finish_reason"] == "error"
    assert whole.content == "ab"
    assert whole.headers["X-OpenRouter-Cache-Status"] == "MISS"


def test_a_client_that_waits_long_for_the_first_word_is_sent_something_meanwhile(
    chat: Chat,
) -> None:
    slow = named(chat, "slow", ScriptedEngine(["yes"], delay_s=0.5))
    with house(chat, slow, keep_alive_s=0.05) as base:
        whole = ask(base)
        stream = ask(base, stream=True)
        message = ask(base, path="/v1/messages", max_tokens=5, reasoning=None, stream=True)

    assert whole.text.startswith("  ")
    assert (whole.status, whole.content) == (200, "yes")
    assert whole.headers["X-Generation-Id"] == whole.json["id"]
    assert stream.text.startswith(": OPENROUTER PROCESSING\n\n" * 3)
    assert stream.headers["content-type"] == "text/event-stream"
    assert {chunk["id"] for chunk in stream.chunks} == {stream.headers["X-Generation-Id"]}
    assert message.text.startswith('event: ping\ndata: {"type":"ping"}\n\n')


def test_a_failure_after_a_long_wait_is_told_in_the_body_for_its_status_is_out(
    chat: Chat, tmp_path: Path
) -> None:
    dying = ScriptedEngine(["a"], fails_at=0)
    dying.fails_after_s = 0.4
    dead = named(chat, "dead", dying)
    with open_books(str(tmp_path)) as books, closing(Ledger(books)) as ledger:
        with house(chat, dead, named(chat, "well"), keep_alive_s=0.05, ledger=ledger) as base:
            whole = ask(base)
            stream = ask(base, stream=True)
            instead = ask(base, models=["dead", "well"], stream=True)
        rows = [
            asyncio.run(ledger.find(answer.headers["X-Generation-Id"]))
            for answer in (whole, stream, instead)
        ]

    assert whole.status == stream.status == 200
    assert whole.error["code"] == 502
    assert stream.chunks[-1]["error"]["code"] == 502
    assert stream.text.endswith("data: [DONE]\n\n")
    said = [c["choices"][0]["delta"]["content"] for c in instead.chunks if c["choices"]]
    assert "".join(said) == "well"
    assert [row and (row.model, row.error_type) for row in rows] == [
        ("local/dead", "provider_unavailable"),
        ("local/dead", "provider_unavailable"),
        ("local/well", None),
    ]


class Buggy(ScriptedEngine):
    async def generate(self, *_: Any) -> AsyncGenerator[Delta, None]:
        raise RuntimeError("a fault of ours")
        yield Delta()


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
def test_of_a_fault_of_ours_nobody_is_told_how_the_request_got_there(chat: Chat, path: str) -> None:
    fields = {"prompt": "a"} if path == "completions" else {"messages": [USER]}
    fields = {"input": "a"} if path == "responses" else fields
    absent = dict.fromkeys({"messages", "reasoning", "model"} - set(fields))
    with house(
        chat, named(chat, "buggy", Buggy()), named(chat, "dead", ScriptedEngine(fails_at=0))
    ) as base:
        wanted = {"X-OpenRouter-Metadata": "enabled"}
        ours, other = (
            ask(base, wanted, path=f"/v1/{path}", **absent | fields | {"model": model})
            for model in ("buggy", "dead")
        )
    assert (ours.status, other.status) == (500, 502)
    assert "fault" not in ours.text
    assert "openrouter_metadata" not in ours.json
    assert "openrouter_metadata" in other.json
