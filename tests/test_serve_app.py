"""The API over HTTP: whole transcripts, failures with their status, hang-ups."""

import asyncio
import gc
import http.client
import json
import time
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from asking import Response
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.serve.api.app import App
from pipeline.serve.api.exchange import MAX_BODY_BYTES
from pipeline.serve.offer.catalog import Catalog, Served

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
THOUGHT = ["<think>", "\nhm\n", "</think>", "\n\n", "ye", "s"]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
CHAT = "/api/v1/chat/completions"


def connect(base: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(base).netloc, timeout=10)


def send(base: str, body: Any, path: str = CHAT, method: str = "POST") -> Response:
    connection = connect(base)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data if method == "POST" else None)
    try:
        return Response(connection.getresponse())
    finally:
        connection.close()


def ask(base: str, **fields: Any) -> Response:
    return send(base, {"messages": [USER], **fields})


def wait_until(condition: Any) -> float:
    """Seconds until it holds."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < 5
        time.sleep(0.005)
    return time.monotonic() - begin


def test_a_stream_is_reasoning_answer_finish_usage_done(serving: Any) -> None:
    with serving(ScriptedEngine(THOUGHT)) as base:
        response = ask(base, stream=True)

    frames = response.text.split("\n\n")
    assert frames[0] == ": OPENROUTER PROCESSING"
    assert frames[-2:] == ["data: [DONE]", ""]
    *said, finish, usage = response.chunks
    assert [chunk["choices"][0]["delta"] for chunk in said] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning": "hm",
            "reasoning_details": [
                {"type": "reasoning.text", "text": "hm", "format": "unknown", "index": 0}
            ],
        },
        {"role": "assistant", "content": "ye"},
        {"role": "assistant", "content": "s"},
    ]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in said)
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + 7
    assert usage["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3
    assert {chunk["id"] for chunk in response.chunks} == {response.headers["X-Generation-Id"]}
    assert response.headers["Content-Type"] == "text/event-stream"


@pytest.mark.parametrize("chunks", [THOUGHT, ["a", "b"], ["x\n", CALL, CALL], []])
def test_a_stream_and_a_whole_reply_say_the_same(serving: Any, chunks: list[str]) -> None:
    with serving(ScriptedEngine(chunks)) as base:
        stream = ask(base, stream=True, tools=[TOOL]).chunks
        whole = ask(base, tools=[TOOL]).json

    deltas = [chunk["choices"][0]["delta"] for chunk in stream[:-1]]
    choice = whole["choices"][0]
    message = choice["message"]
    assert "".join(delta.get("content") or "" for delta in deltas) == (message["content"] or "")
    thought = "".join(delta.get("reasoning") or "" for delta in deltas)
    assert thought == (message["reasoning"] or "")
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    calls = message.get("tool_calls", [])
    assert len({part["id"] for part in parts if "id" in part}) == len(calls)
    for call in calls:
        mine = [part["function"] for part in parts if part["index"] == call["index"]]
        assert "".join(part["arguments"] for part in mine) == call["function"]["arguments"]
    assert stream[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert stream[-1]["usage"] == whole["usage"]
    assert whole["system_fingerprint"] is None


def test_excluded_reasoning_is_counted_and_not_told(serving: Any) -> None:
    with serving(ScriptedEngine(THOUGHT)) as base:
        stream = ask(base, stream=True, reasoning={"exclude": True})
        whole = ask(base, include_reasoning=False).json

    assert "hm" not in str([chunk["choices"] for chunk in stream.chunks])
    assert whole["choices"][0]["message"]["reasoning"] is None
    assert "reasoning_details" not in whole["choices"][0]["message"]
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_before_the_first_token_is_an_http_error(serving: Any, stream: bool) -> None:
    with serving(ScriptedEngine(["a"], fails_at=0)) as base:
        response = ask(base, stream=stream)

    assert response.status == 502
    assert response.headers["Content-Type"] == "application/json"
    assert response.json["error"]["metadata"]["error_type"] == "provider_unavailable"


def test_a_failure_is_logged_once(serving: Any, caplog: Any) -> None:
    for stream in (True, False):
        with serving(ScriptedEngine(["a"], fails_at=0)) as base:
            ask(base, stream=stream)

    assert caplog.text.count("has died") == 2


def test_a_failure_after_the_first_token_is_an_event_in_the_stream(serving: Any) -> None:
    engine = ScriptedEngine(["a", "b"], fails_at=1)
    with serving(engine) as base:
        response = ask(base, stream=True)

    assert response.status == 200
    *_, last = response.chunks
    assert last["error"]["code"] == 502
    assert last["choices"][0]["finish_reason"] == "error"
    assert response.text.endswith("data: [DONE]\n\n")
    assert engine.num_open == 0


def test_a_failure_after_the_first_token_keeps_what_was_said(serving: Any) -> None:
    with serving(ScriptedEngine(["a", "b"], fails_at=1)) as base:
        choice = ask(base).json["choices"][0]

    assert choice["message"]["content"] == "a"
    assert (choice["finish_reason"], choice["error"]["code"]) == ("error", 502)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("delay_s", [0.01, 60.0])
def test_a_hang_up_closes_the_engine(serving: Any, stream: bool, delay_s: float) -> None:
    engine = ScriptedEngine(["word "] * 100_000, delay_s=delay_s)
    with serving(engine) as base:
        connection = connect(base)
        connection.request("POST", CHAT, json.dumps({"messages": [USER], "stream": stream}))
        wait_until(lambda: engine.num_open == 1)
        time.sleep(0.1)
        if stream and delay_s < 1:
            assert connection.getresponse().read(50)
        connection.close()
        if connection.sock is not None:
            connection.sock.close()

        assert wait_until(lambda: engine.num_open == 0) < 1


def test_a_gap_is_filled_with_comments(serving: Any) -> None:
    with serving(ScriptedEngine(["a", "b"], delay_s=0.3), keep_alive_s=0.05) as base:
        response = ask(base, stream=True)

    assert response.text.count(": OPENROUTER PROCESSING\n\n") >= 4
    assert response.chunks[-1]["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("delay_s", [0.05, 60.0])
def test_a_hang_up_that_only_the_comments_meet_is_quiet(
    chat: Chat, caplog: Any, delay_s: float
) -> None:
    app = App(Catalog([Served("tiny", chat, SlowAfterTheFirst(delay_s), 0)]), keep_alive_s=0.01)
    parts = [{"type": "http.request", "body": json.dumps({"messages": [USER], "stream": True})}]
    has_gone = asyncio.Event()
    sent: list[Any] = []

    async def receive() -> Any:
        if parts:
            part = parts.pop()
            return {**part, "body": part["body"].encode()}
        await has_gone.wait()
        await asyncio.sleep(0.1)
        return {"type": "http.disconnect"}

    async def note(message: Any) -> None:
        sent.append(message)
        if len(sent) > 3:
            has_gone.set()
            raise OSError("the client has gone")

    asyncio.run(app({"type": "http", "method": "POST", "path": CHAT}, receive, note))
    gc.collect()

    assert has_gone.is_set()
    assert caplog.text == ""


class SlowAfterTheFirst(ScriptedEngine):
    """Its first word comes at once."""

    def __init__(self, delay_s: float) -> None:
        super().__init__(["a", "b"])
        self.later_s = delay_s

    async def generate(self, *asked: Any) -> Any:
        async for delta in super().generate(*asked):
            yield delta
            self.delay_s = self.later_s


def test_odd_things_handed_back_are_no_reason_to_refuse(serving: Any) -> None:
    odd = ["text", 7, None, {"text": 1}, ["x"], {"type": "reasoning.text", "text": "hm"}]
    handed_back = {"role": "assistant", "content": "yes", "reasoning_details": odd}
    with serving(ScriptedEngine()) as base:
        assert ask(base, messages=[USER, handed_back, USER]).status == 200


def test_ignored_parameters_are_named_in_a_header(serving: Any) -> None:
    with serving(ScriptedEngine()) as base:
        response = ask(base, top_a=0.5, user="me", **{"bad\r\nkey: ä": 1})
        named = ask(base, messages=[{**USER, "mood": "a"}, {**USER, "mood": "b"}])
        plain = ask(base)

    assert response.headers["X-Ignored-Parameters"] == "top_a, bad%0D%0Akey%3A%20%C3%A4"
    assert named.headers["X-Ignored-Parameters"] == "messages[].mood"
    assert "X-Ignored-Parameters" not in plain.headers


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"{}", 400, "Input required"),
        (b'{"messages": []}', 400, "Input required"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', 400, "messages.0.role"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_p": 2}', 400, "top_p"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_k": "2"}', 400, "top_k"),
        (b'{"messages": [{"role": "user"}], "model": "x"}', 400, "x is not a valid model ID"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "not JSON"),
        (b" " * (MAX_BODY_BYTES + 1), 413, "larger than"),
    ],
)
def test_a_bad_body_is_the_clients_fault(
    serving: Any, body: bytes, status: int, words: str
) -> None:
    with serving(ScriptedEngine()) as base:
        response = send(base, body)

    assert response.status == response.json["error"]["code"] == status
    assert words in response.json["error"]["message"]
    assert response.json["error"]["metadata"]["error_type"]


def test_deep_but_legal_json_in_a_tool_is_refused(serving: Any) -> None:
    deep: Any = {}
    for _ in range(900):
        deep = {"properties": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    with serving(ScriptedEngine()) as base:
        response = ask(base, tools=[tool])

    assert response.status == 400


def test_other_routes_and_methods_are_json_errors(serving: Any) -> None:
    with serving(ScriptedEngine()) as base:
        missing = send(base, b"", "/api/v1/nothing", "GET")
        wrong = send(base, b"", CHAT, "GET")
        health = send(base, b"", "/health", "GET")

    assert (missing.status, missing.json["error"]["code"]) == (404, 404)
    assert (wrong.status, wrong.json["error"]["code"]) == (405, 405)
    assert (health.status, health.json) == (200, {"status": "ok"})


@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
def test_models_lists_what_is_served(serving: Any, prefix: str) -> None:
    with serving(ScriptedEngine()) as base:
        body = send(base, b"", f"{prefix}/models/", "GET").json

    assert body["total_count"] == 1
    assert body["links"] == {"next": None}
    model = body["data"][0]
    assert (model["id"], model["context_length"]) == ("local/tiny", 1000)
    assert "logprobs" not in model["supported_parameters"]


def test_an_unforeseen_failure_is_a_500_that_gives_nothing_away(serving: Any, caplog: Any) -> None:
    engine = ScriptedEngine()
    engine.context_tokens = "secret"  # type: ignore[assignment]
    with serving(engine) as base:
        response = ask(base)

    assert response.status == 500
    assert response.json["error"]["message"] == "Internal Server Error"
    assert "Traceback" in caplog.text


def test_the_official_client_chats_and_streams(serving: Any) -> None:
    with (
        serving(ScriptedEngine(THOUGHT)) as base,
        openai.OpenAI(base_url=f"{base}/api/v1", api_key="any") as client,
    ):
        whole = client.chat.completions.create(
            model="local/tiny", messages=[{"role": "user", "content": "hi"}]
        )
        with client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
        ) as stream:
            chunks = list(stream)

    assert whole.choices[0].message.content == "yes"
    assert whole.choices[0].message.reasoning == "hm"  # type: ignore[attr-defined]
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "yes"
    assert chunks[-1].usage == whole.usage


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool", "developer"])},
    optional={
        "content": st.text(max_size=9) | json_values,
        "reasoning": json_values,
        "reasoning_details": json_values,
        "tool_calls": st.just([{"function": {"name": "f", "arguments": "{"}}]) | json_values,
    },
)
bodies = json_values | st.fixed_dictionaries(
    {"messages": st.lists(messages, min_size=1, max_size=3)},
    optional=dict.fromkeys(
        ["stop", "seed", "top_k", "tools", "tool_choice", "reasoning", "stream", "model", "n"],
        json_values,
    ),
)


@settings(deadline=None)
@given(body=bodies)
def test_any_json_body_is_answered_or_refused(chat: Chat, body: Any) -> None:
    app = App(Catalog([Served("tiny", chat, ScriptedEngine(), 0)]))
    sent: list[dict[str, Any]] = []
    data = json.dumps(body).encode()
    parts = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Any:
        if parts:
            return parts.pop()
        return await asyncio.Event().wait()

    async def note(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({"type": "http", "method": "POST", "path": CHAT}, receive, note))

    assert sent[0]["status"] in (200, 400, 404)
