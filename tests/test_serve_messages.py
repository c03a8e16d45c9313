"""Anthropic's dialect over HTTP: what clients are told, and what the engine is asked."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedEngine
from sqlalchemy import Engine

from pipeline.chat import Chat
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.offer.catalog import Catalog, Served

PATH = "/messages"
USER = {"role": "user", "content": "hi"}
THOUGHT = ["<think>", "\nhm\n", "</think>", "\n\n", "ye", "s"]
CALLING = [*THOUGHT, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>']
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"name": "f", "description": "d", "input_schema": SCHEMA}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Engine]:
    with open_books(str(tmp_path)) as opened:
        yield opened


def send(base: str, key: str = "", **fields: Any) -> tuple[int, Any, bytes]:
    """Status, headers and body."""
    with Server(f"{base}/api/v1", key).post({"messages": [USER], **fields}, PATH) as response:
        return response.status, response.headers, response.read()


def refused(base: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    status, _, body = send(base, **fields)
    told = json.loads(body)
    assert (told["type"], told["request_id"]) == ("error", None)
    return status, told["error"]


def events(body: bytes) -> list[dict[str, Any]]:
    frames = [frame.split(b"\n") for frame in body.removesuffix(b"\n\n").split(b"\n\n")]
    return [json.loads(data.removeprefix(b"data: ")) for _, data in frames]


def asked_by(serving: Any, path: str, body: dict[str, Any]) -> list[Any]:
    """What the engine was asked for a request's sake."""
    engine = ScriptedEngine(THOUGHT, able=["grammar", "top_k"])
    with serving(engine) as base, Server(f"{base}/api/v1").post(body, path) as response:
        assert response.status == 200, response.read()
    return engine.asked


def test_a_stream_and_a_whole_message_say_the_same(serving: Any) -> None:
    with serving(ScriptedEngine(CALLING)) as base:
        status, headers, streamed = send(base, tools=[TOOL], stream=True)
        _, _, body = send(base, tools=[TOOL])

    assert (status, headers["Content-Type"]) == (200, "text/event-stream")
    start, ping, *told, delta, stop = events(streamed)
    assert [event["type"] for event in (start, ping, delta, stop)] == [
        "message_start",
        "ping",
        "message_delta",
        "message_stop",
    ]
    assert start["message"]["id"] == headers["X-Generation-Id"]
    whole = json.loads(body)
    kinds = [event["content_block"]["type"] for event in told if "content_block" in event]
    assert (
        kinds == [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
    )
    assert delta["delta"]["stop_reason"] == whole["stop_reason"] == "tool_use"
    assert delta["usage"] == whole["usage"]
    usage = whole["usage"]
    prompt_tokens = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert start["message"]["usage"]["input_tokens"] == prompt_tokens


def test_the_engine_is_asked_what_it_is_asked_for_the_same_chat(serving: Any) -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "I call."},
        CALL,
    ]
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "7"}
    messages = {
        "system": "be kind",
        "messages": [
            USER,
            {"role": "assistant", "content": blocks},
            {"role": "user", "content": [result]},
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 50},
        "stop_sequences": ["zz"],
        "max_tokens": 90,
        "top_k": 3,
    }
    function = {"name": "f", "description": "d", "parameters": SCHEMA}
    call = {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    chat = {
        "messages": [
            {"role": "system", "content": "be kind"},
            USER,
            {"role": "assistant", "content": "I call.", "reasoning": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "toolu_1", "content": "7"},
        ],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "reasoning": {"max_tokens": 50},
        "stop": ["zz"],
        "max_tokens": 90,
        "top_k": 3,
    }

    asked = asked_by(serving, PATH, messages)
    assert asked == asked_by(serving, "/chat/completions", chat)
    assert asked != asked_by(serving, PATH, {**messages, "system": "be rude"})


@pytest.mark.parametrize("display", ["omitted", "summarized"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_omitted_thought_is_counted_and_not_told(
    serving: Any, display: str, stream: bool
) -> None:
    thinking = {"type": "adaptive", "display": display}
    with serving(ScriptedEngine(THOUGHT)) as base:
        _, _, body = send(base, thinking=thinking, stream=stream)

    assert (b"hm" in body) == (display == "summarized")
    assert b'"thinking_tokens":3' in body


def test_a_begun_answer_is_continued(serving: Any, chat: Chat) -> None:
    asked = asked_by(serving, PATH, {"messages": [USER, {"role": "assistant", "content": "It is"}]})
    assert chat.decode(asked[0][0]).endswith("It is")


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_a_status(serving: Any, stream: bool) -> None:
    with serving(ScriptedEngine(["a"], fails_at=0)) as base:
        status, error = refused(base, stream=stream)

    assert (status, error["type"]) == (502, "api_error")


def test_a_failure_after_the_first_token_is_the_last_event(serving: Any) -> None:
    with serving(ScriptedEngine(["a", "b"], fails_at=1)) as base:
        status, headers, body = send(base, stream=True)

    *_, last = events(body)
    assert (status, last["type"], last["error"]["type"]) == (200, "error", "api_error")
    assert last["request_id"] == headers["X-Generation-Id"]


def test_a_gap_is_filled_with_pings(serving: Any) -> None:
    with serving(ScriptedEngine(["a", "b"], delay_s=0.3), keep_alive_s=0.05) as base:
        _, _, body = send(base, stream=True)

    told = [event["type"] for event in events(body)]
    assert told.count("ping") >= 4
    assert next(kind for kind in told if kind != "ping") == "message_start"


def test_what_changes_nothing_is_named(serving: Any) -> None:
    with serving(ScriptedEngine()) as base:
        _, headers, _ = send(base, context_management={}, thinking={"type": "disabled"}, x=1)
        _, silent, _ = send(base, cache_control={"type": "ephemeral"})

    assert headers["X-Ignored-Parameters"] == "context_management, x"
    assert silent["X-Ignored-Parameters"] is None


def test_refusals_are_in_the_shape_of_this_dialect(serving: Any) -> None:
    image = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
    with serving(ScriptedEngine()) as base:
        unknown = refused(base, model="nobody/nothing")
        unread = refused(base, messages=[{"role": "user", "content": [image]}])
        wrong = refused(base, thinking={"type": "enabled"})

    assert (unknown[0], unknown[1]["type"]) == (400, "invalid_request_error")
    assert unknown[1]["message"] == "nobody/nothing is not a valid model ID"
    assert unknown[1]["availability"]["code"] == "model_not_found"
    assert (unread[0], unread[1]["type"]) == (404, "not_found_error")
    assert "support image input" in unread[1]["message"]
    assert (wrong[0], wrong[1]["type"]) == (400, "invalid_request_error")


def test_a_key_is_wanted_and_its_lack_is_told_in_this_dialect(serving: Any, books: Engine) -> None:
    keys = Keys(books)
    with serving(ScriptedEngine(), keys=keys) as base:
        status, error = refused(base)
        admitted, _, _ = send(base, keys.create("mine"))

    assert (status, error["type"], admitted) == (401, "authentication_error", 200)


scraps: Any = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.sampled_from(["auto", "text", "hi", "\0", "f"]),
    st.just({}),
    st.just([]),
)


def objects(**fields: Any) -> Any:
    """Some of these, right or wrong."""
    return st.fixed_dictionaries({}, optional={k: v | scraps for k, v in fields.items()})


kinds = st.sampled_from(
    ["text", "thinking", "redacted_thinking", "tool_use", "tool_result", "image", "odd"]
)
blocks = objects(
    type=kinds,
    text=st.text(max_size=3),
    thinking=st.text(max_size=3),
    id=st.just("toolu_1"),
    name=st.just("f"),
    input=st.just({"a": 1}),
    tool_use_id=st.just("toolu_1"),
    content=st.just([{"type": "text", "text": "7"}]),
)
turns = objects(
    role=st.sampled_from(["user", "assistant", "system"]),
    content=st.text(max_size=3) | st.lists(blocks, max_size=2),
)
bodies = objects(
    messages=st.lists(turns, min_size=1, max_size=3),
    system=st.text(max_size=3) | st.lists(blocks, max_size=1),
    tools=st.lists(
        objects(type=st.just("custom"), name=st.just("f"), input_schema=st.just(SCHEMA))
    ),
    tool_choice=objects(
        type=st.sampled_from(["auto", "any", "none", "tool"]), name=st.sampled_from(["f", "g"])
    ),
    thinking=objects(
        type=st.sampled_from(["enabled", "disabled", "adaptive"]), budget_tokens=st.just(9)
    ),
    output_config=objects(
        effort=st.sampled_from(["low", "none"]),
        format=objects(type=st.just("json_schema"), schema=st.just(SCHEMA)),
    ),
    stop_sequences=st.lists(st.text(max_size=2), max_size=5),
    metadata=objects(user_id=st.just("u")),
    fallbacks=st.lists(objects(model=st.just("tiny")), max_size=4),
    max_tokens=st.integers(-1, 50),
    stream=st.booleans(),
    n=st.integers(0, 2),
    debug=st.just({"echo_upstream_body": True}),
)


@settings(max_examples=300)
@given(body=bodies)
def test_any_body_is_answered_or_refused(chat: Chat, body: Any) -> None:
    app = App(Catalog([Served("tiny", chat, ScriptedEngine(able=["grammar"]), 0)]))
    sent: list[dict[str, Any]] = []
    parts = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        return parts.pop() if parts else await asyncio.Event().wait()

    async def note(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({"type": "http", "method": "POST", "path": "/v1/messages"}, receive, note))

    status = sent[0]["status"]
    assert status in (200, 400, 404)
    told = b"".join(message["body"] for message in sent[1:])
    if status != 200:
        assert json.loads(told)["error"]["message"]
    assert b"event: error" not in told


@pytest.mark.parametrize(
    ("stops", "reason", "sequence"),
    [
        (["nothing"], "end_turn", None),
        (["nothing", "es"], "stop_sequence", "es"),
        (["</think>"], "stop_sequence", "</think>"),
    ],
)
def test_a_stop_sequence_that_ended_the_message_is_named(
    serving: Any, stops: list[str], reason: str, sequence: str | None
) -> None:
    with serving(ScriptedEngine(THOUGHT)) as base:
        whole = json.loads(send(base, stop_sequences=stops)[2])
        stream = events(send(base, stop_sequences=stops, stream=True)[2])
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    (delta,) = (event["delta"] for event in stream if event["type"] == "message_delta")
    assert (delta["stop_reason"], delta["stop_sequence"]) == (reason, sequence)
