"""Anthropic's dialect as it is written: blocks, streamed or whole, and failures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.chat import Chat, ToolCall
from pipeline.errors import Availability, RequestError
from pipeline.serve.offer.price import Cost
from pipeline.serve.replying.events import Called, Ended, Event, Said, Usage
from pipeline.serve.skins.messages import Messages
from pipeline.serve.skins.skin import Bill, Heading

SCHEMAS = json.loads((Path(__file__).parent / "openrouter_schemas.json").read_text("utf-8"))
MESSAGES = Messages()
BILL = Bill(Usage(10, 7, 4, 3), Cost(1_500_000, 2_000_000))
CALL = Called(0, ToolCall("f", '{"a": [1, "ü"]}'))
END = Ended("stop", "stop")
REPLY: list[Event] = [
    Said("reasoning", "h"),
    Said("reasoning", "m"),
    Said("answer", "ye"),
    Said("answer", "s"),
    CALL,
    Called(1, ToolCall("g", "{}")),
    Ended("tool_calls", "stop"),
]
replies = st.lists(
    st.one_of(
        st.builds(Said, st.sampled_from(["reasoning", "answer"]), st.text(max_size=3)),
        st.just(CALL),
    ),
    max_size=12,
).map(lambda events: [*events, END])


@pytest.fixture
def heading(chat: Chat) -> Heading:
    return Heading("gen-1", 1767225600, "me/tiny", "Me", chat, num_prompt_tokens=10)


def parse(stream: bytes) -> list[dict[str, Any]]:
    """Its events, each of which is named twice."""
    events = []
    for frame in stream.decode().removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def streamed(heading: Heading, events: list[Event], bill: Bill = BILL) -> list[dict[str, Any]]:
    writer = MESSAGES.writer(heading)
    told = writer.begin(None)
    for event in events:
        told += writer.frames(0, event)
    return parse(told + writer.finish(bill))


def whole(
    heading: Heading, events: list[Event], bill: Bill = BILL, error: RequestError | None = None
) -> dict[str, Any]:
    writer = MESSAGES.writer(heading)
    for event in events:
        writer.add(0, event)
    return writer.body(bill, error)


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Types of events, and of what is in them."""
    inner = [event.get("content_block") or event.get("delta") or {} for event in events]
    return [
        " ".join([event["type"].removeprefix("content_block_"), part.get("type", "")]).strip()
        for event, part in zip(events, inner, strict=True)
    ]


def content(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks as a client puts them together; asserts that each is whole before the next."""
    blocks: list[dict[str, Any]] = []
    is_open = False
    for event in events:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"] | {"json": ""})
            is_open = True
        elif event["type"] in ("content_block_delta", "content_block_stop"):
            assert is_open
            assert event["index"] == len(blocks) - 1
            if event["type"] == "content_block_stop":
                is_open = False
                continue
            delta = dict(event["delta"])
            kind = delta.pop("type").removesuffix("_delta")
            names = {"input_json": "json"}
            ((_, bit),) = delta.items()
            blocks[-1][names.get(kind, kind)] += bit
    assert not is_open
    for block in blocks:
        arguments = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(arguments)
    return blocks


def without_ids(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ids = [block["id"] for block in blocks if "id" in block]
    assert len(set(ids)) == len(ids)
    assert all(call_id.startswith("toolu_") for call_id in ids)
    return [{key: value for key, value in block.items() if key != "id"} for block in blocks]


def check(body: Any, root: str) -> None:
    schema = {**SCHEMAS["roots"][root], "components": SCHEMAS["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)


def test_a_stream_has_its_events_in_their_order(heading: Heading) -> None:
    assert kinds(streamed(heading, REPLY)) == [
        "message_start",
        "ping",
        "start thinking",
        "delta thinking_delta",
        "delta thinking_delta",
        "delta signature_delta",
        "stop",
        "start text",
        "delta text_delta",
        "delta text_delta",
        "stop",
        "start tool_use",
        "delta input_json_delta",
        "stop",
        "start tool_use",
        "delta input_json_delta",
        "stop",
        "message_delta",
        "message_stop",
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(replies)
@example([Said("answer", ""), END])
@example([*REPLY[:-1], *REPLY])
def test_a_stream_adds_up_to_the_whole_message(heading: Heading, events: list[Event]) -> None:
    told, body = streamed(heading, events), whole(heading, events)

    assert without_ids(content(told)) == without_ids(body["content"])
    check(body, "messages")
    said = [event for event in events if isinstance(event, Said)]
    for channel, kind in (("reasoning", "thinking"), ("answer", "text")):
        blocks = [block[kind] for block in body["content"] if block["type"] == kind]
        assert "".join(blocks) == "".join(bit.text for bit in said if bit.channel == channel)
        assert all(blocks), "a block of nothing was told"


def test_a_whole_message_is_a_valid_one(heading: Heading) -> None:
    body = whole(heading, REPLY, Bill(BILL.usage, BILL.cost))

    check(body, "messages")
    assert {key: body[key] for key in ("id", "type", "role", "model", "provider")} == {
        "id": "gen-1",
        "type": "message",
        "role": "assistant",
        "model": "me/tiny",
        "provider": "Me",
    }
    thinking, text, call, _ = body["content"]
    assert thinking == {"type": "thinking", "thinking": "hm", "signature": ""}
    assert text == {"type": "text", "text": "yes", "citations": None}
    assert (call["name"], call["input"]) == ("f", {"a": [1, "ü"]})
    assert call["caller"] == {"type": "direct"}


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("stop", "end_turn"),
        ("length", "max_tokens"),
        ("tool_calls", "tool_use"),
        ("content_filter", "refusal"),
    ],
)
def test_why_a_message_stopped_is_told(heading: Heading, finish: Any, reason: str) -> None:
    events: list[Event] = [Said("answer", "a"), Ended(finish, "stop")]
    (delta,) = [e["delta"] for e in streamed(heading, events) if e["type"] == "message_delta"]

    assert whole(heading, events)["stop_reason"] == delta["stop_reason"] == reason
    assert delta == {
        "stop_reason": reason,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
    }


def test_usage_tells_cached_tokens_apart_and_what_all_cost(heading: Heading) -> None:
    usage = whole(heading, REPLY)["usage"]
    *_, delta, _ = streamed(heading, REPLY)

    assert usage == delta["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (7, 3)
    assert (usage["output_tokens"], usage["output_tokens_details"]) == (7, {"thinking_tokens": 4})
    assert (usage["cost"], usage["is_byok"]) == (3.5e-6, False)
    assert usage["cost_details"] == {
        "upstream_inference_cost": 3.5e-6,
        "upstream_inference_prompt_cost": 1.5e-6,
        "upstream_inference_completions_cost": 2e-6,
    }


def test_a_stream_begins_with_an_empty_message_and_the_size_of_its_prompt(heading: Heading) -> None:
    start, ping, *_ = streamed(heading, REPLY)

    check(start["message"], "messages")
    assert (start["message"]["content"], start["message"]["stop_reason"]) == ([], None)
    usage = start["message"]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (10, 0)
    assert ping == {"type": "ping"}
    assert parse(MESSAGES.keep_alive) == [ping]


def test_the_order_to_the_engine_stands_beside_the_empty_message(heading: Heading) -> None:
    start, _ = parse(MESSAGES.writer(heading).begin({"prompt": [1]}))
    assert start["debug"] == {"echo_upstream_body": {"prompt": [1]}}


def test_metadata_comes_at_the_end_for_those_who_want_it(heading: Heading) -> None:
    bill = replace(BILL, metadata={"attempt": 1})
    *_, stop = streamed(heading, REPLY, bill)
    *_, bare = streamed(heading, REPLY)

    assert stop == {"type": "message_stop", "openrouter_metadata": {"attempt": 1}}
    assert bare == {"type": "message_stop"}
    assert whole(heading, REPLY, bill)["openrouter_metadata"] == {"attempt": 1}
    assert "openrouter_metadata" not in whole(heading, REPLY)


def test_a_stream_that_breaks_ends_with_one_error(heading: Heading) -> None:
    error = RequestError("Provider returned error", 502, "provider_unavailable")
    writer = MESSAGES.writer(heading)
    told = writer.begin(None) + writer.frames(0, Said("answer", "a")) + writer.fail(error, BILL)
    *_, delta, last = parse(told)

    assert delta["type"] == "content_block_delta"
    assert last == {
        "type": "error",
        "error": {
            "type": "api_error",
            "message": "Provider returned error",
            "error_type": "provider_unavailable",
        },
        "request_id": "gen-1",
    }
    check(last, "messages_error")


def test_a_whole_message_that_breaks_keeps_what_was_said(heading: Heading) -> None:
    error = RequestError("Provider returned error", 502, "provider_unavailable")
    body = whole(heading, [Said("answer", "a")], error=error)

    assert body["content"][0]["text"] == "a"
    assert (body["stop_reason"], body["error"]["type"]) == (None, "api_error")


@pytest.mark.parametrize(
    ("status", "error_type", "expected"),
    [
        (400, "invalid_request", "invalid_request_error"),
        (400, "context_length_exceeded", "invalid_request_error"),
        (400, "content_policy_violation", "invalid_request_error"),
        (413, "payload_too_large", "invalid_request_error"),
        (401, "authentication", "authentication_error"),
        (402, "payment_required", "billing_error"),
        (403, "permission_denied", "permission_error"),
        (404, "not_found", "not_found_error"),
        (429, "rate_limit_exceeded", "rate_limit_error"),
        (500, "server", "api_error"),
        (502, "provider_unavailable", "api_error"),
        (503, "provider_overloaded", "overloaded_error"),
        (504, "timeout", "timeout_error"),
    ],
)
def test_failures_have_anthropics_names(status: int, error_type: str, expected: str) -> None:
    body = MESSAGES.error_body(RequestError("why", status, error_type), ())

    check(body, "messages_error")
    assert body == {
        "type": "error",
        "error": {"type": expected, "message": "why", "error_type": error_type},
        "request_id": None,
    }


def test_a_failure_tells_what_would_answer_instead() -> None:
    availability = Availability("model_not_found", fallback_models=("me/tiny",))
    error = RequestError("x is not a valid model ID", availability=availability)
    body = MESSAGES.error_body(error, ["x"], {"requested": "x"})

    check(body, "messages_error")
    told = body["error"]["availability"]
    assert (told["code"], told["requested_models"]) == ("model_not_found", ["x"])
    assert told["fallback_models"] == ["me/tiny"]
    assert body["openrouter_metadata"] == {"requested": "x"}
