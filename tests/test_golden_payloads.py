"""Payloads and transcripts that the official clients are known to read: ours are the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from books import generation
from scripted import ScriptedEngine

from pipeline.chat import Chat, ToolCall
from pipeline.errors import RequestError
from pipeline.serve import schema
from pipeline.serve.books.ledger import Spent
from pipeline.serve.offer.catalog import Served
from pipeline.serve.offer.price import Price
from pipeline.serve.replying.events import Called, Ended, Event, Said, Usage
from pipeline.serve.routing.endpoint import Own
from pipeline.serve.schema.endpoints import Seen, endpoints_body
from pipeline.serve.schema.reply import ChatStyle, ChatWriter
from pipeline.serve.skins.skin import Bill, Heading

GOLDEN = json.loads(Path(__file__).with_name("golden_payloads.json").read_text())
PRICE = Price(prompt=50_000, completion=400_000)
USAGE = Usage(24, 90, 60)
END = Ended("tool_calls", "stop")


def writer(chat: Chat, like: Any, **style: Any) -> ChatWriter:
    """Of a reply with the heading of a golden one."""
    names = ("id", "created", "model", "provider")
    said = {name: like.get(name, GOLDEN["result"][name]) for name in names}
    return ChatWriter(Heading(**said, chat=chat), ChatStyle(**style))


def bill(usage: Usage) -> Bill:
    return Bill(usage, PRICE.cost(usage))


def frames(data: bytes) -> list[Any]:
    parts = [part for part in data.decode().split("\n\n") if part]
    return [json.loads(part[6:]) if part.startswith("data: {") else part for part in parts]


def without(value: Any, *names: str) -> Any:
    """The same without keys of these names, at any depth."""
    if isinstance(value, dict):
        return {key: without(inner, *names) for key, inner in value.items() if key not in names}
    return [without(inner, *names) for inner in value] if isinstance(value, list) else value


def keys(value: Any, path: str = "") -> set[str]:
    """The paths of all keys in it."""
    if isinstance(value, dict):
        inner = [keys(inner, f"{path}.{key}") | {f"{path}.{key}"} for key, inner in value.items()]
        return set().union(*inner)
    return (
        set().union(*(keys(inner, path) for inner in value)) if isinstance(value, list) else set()
    )


def test_a_whole_reply(chat: Chat) -> None:
    reply = writer(chat, GOLDEN["result"])
    call = Called(0, ToolCall("f", '{"a": 1}'))
    events: list[Event] = [Said("reasoning", "think"), Said("answer", "hello"), call, END]
    for event in events:
        reply.add(0, event)

    ours = reply.body(bill(USAGE), None)

    assert list(ours) == list(GOLDEN["result"])
    made = without(ours, "id", "native_finish_reason")
    assert made == without(GOLDEN["result"], "id", "signature", "native_finish_reason")


def test_the_kinds_of_chunks(chat: Chat) -> None:
    reply = writer(chat, GOLDEN["chunk"])
    call = Called(0, ToolCall("f", '{"a": 1}'))
    said, first, _ = frames(reply.frames(0, Said("reasoning", "think")) + reply.frames(0, call))

    golden = without(GOLDEN["chunk"], "logprobs")
    delta = golden["choices"][0]["delta"]
    reasoning = {key: delta[key] for key in ("role", "content", "reasoning", "reasoning_details")}
    assert said == {**golden, "choices": [{**golden["choices"][0], "delta": reasoning}]}
    assert without(first["choices"][0]["delta"]["tool_calls"], "id") == without(
        delta["tool_calls"], "id"
    )


def test_the_chunk_with_the_usage_in_both_forms(chat: Chat) -> None:
    golden = GOLDEN["usagechunk"]
    usage, done = frames(writer(chat, golden).finish(bill(USAGE)))
    assert (usage, done) == (golden, "data: [DONE]")

    reply = writer(chat, golden, usage_chunk="repeat")
    (end,) = frames(reply.frames(0, Ended("stop", "stop")))
    repeated, _ = frames(reply.finish(bill(USAGE)))
    assert repeated == {**golden, "choices": end["choices"]}


def test_a_failure_in_the_middle_of_a_stream(chat: Chat) -> None:
    golden = GOLDEN["errchunk"]
    failure = RequestError("Provider disconnected", 502, "provider_unavailable")
    ours, done = frames(writer(chat, golden).fail(failure, Bill(Usage())))
    assert (ours, done) == (without(golden, "provider_code"), "data: [DONE]")


def test_a_stream_that_thinks_and_answers(chat: Chat) -> None:
    comment, *golden = GOLDEN["transcript_reasoning"]
    reply = writer(chat, {})
    events: list[Event] = [
        Said("reasoning", "The user"),
        Said("reasoning", " asks"),
        Said("answer", "x = 7"),
        Ended("stop", "stop"),
    ]
    stream = reply.begin(None) + b"".join(reply.frames(0, event) for event in events)
    ours = frames(stream + reply.finish(bill(Usage(40, 129, 31))))

    assert ours.pop(0) == comment
    names = ("id", "object", "created", "model", "provider")
    assert without(ours, *names) == without(golden, *names, "service_tier")


def test_a_stream_with_two_calls(chat: Chat) -> None:
    golden = [frame for frame in GOLDEN["transcript_tools"] if isinstance(frame, dict)]
    reply = writer(chat, {})
    events: list[Event] = [
        Called(0, ToolCall("get_weather", '{"city": "Rome"}')),
        Called(1, ToolCall("get_time", "{}")),
        Ended("tool_calls", "tool_calls"),
    ]
    ours = frames(b"".join(reply.frames(0, event) for event in events))

    for ends in (ours, golden[:-1]):
        assert ends[-1]["choices"][0]["finish_reason"] == "tool_calls"
        assert ends[-1]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert calls(ours[:-1]) == calls(golden[:-2])


def calls(chunks: list[Any]) -> list[Any]:
    """As a client puts them together: the first part of each call has no arguments yet."""
    whole: list[Any] = []
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        assert (delta["role"], delta["content"]) == ("assistant", None)
        (call,) = delta["tool_calls"]
        if "id" in call:
            assert (call["index"], call["function"]["arguments"]) == (len(whole), "")
            whole.append((call["type"], call["function"]["name"], []))
        else:
            whole[call["index"]][2].append(call["function"]["arguments"])
    return [(kind, name, "".join(parts)) for kind, name, parts in whole]


@pytest.mark.parametrize("name", ["models", "eps", "key", "gen"])
def test_the_other_bodies_have_every_key(chat: Chat, name: str) -> None:
    served = Served("qwen3-8b-ft", chat, ScriptedEngine(able=("grammar",)), 1767225600)
    document = schema.model_document(served)
    ours = {
        "models": lambda: schema.models_body([document], 1, None),
        "eps": lambda: endpoints_body(served, [Seen(Own(served), True, True)]),
        "key": lambda: schema.key_body(None, Spent()),
        "gen": lambda: schema.generation_body(generation()),
    }[name]()

    # What is not measured is null as a whole, what nobody sells has no price, engines give no ids.
    absent = {".data.endpoints.latency_last_30m", ".data.pricing.web_search"}
    absent |= {".data.pricing.internal_reasoning", ".data.reasoning.default_effort"}
    absent |= {".data.provider_responses.id"}
    missing = keys(GOLDEN[name]) - keys(ours)
    assert {key for key in missing if not any(key.startswith(part) for part in absent)} == set()
