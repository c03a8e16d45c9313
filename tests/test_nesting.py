"""Deeply nested JSON, wherever something goes down into it: refused, and never a failure."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from inside import ask
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.serve.api.app import App
from pipeline.serve.asking.nesting import is_deeper
from pipeline.serve.asking.request import MAX_DEPTH
from pipeline.serve.offer.catalog import Catalog, Served

USER = {"role": "user", "content": "hi"}
LEVELS = {
    "objects": ('{"a":', "}"),
    "arrays": ("[", "]"),
    "items": ('{"items":', "}"),
    "properties": ('{"properties":{"a":', "}}"),
    "anyOf": ('{"anyOf":[', "]}"),
}


def calls(arguments: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of tools, as JSON or as the text of it."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    made = {"role": "assistant", "content": None, "tool_calls": [call]}
    answered = {"role": "tool", "tool_call_id": "1", "content": arguments}
    yield "chat/completions", {"messages": [USER, made]}
    yield "chat/completions", {"messages": [USER, made, answered]}
    item = {"type": "function_call", "call_id": "1", "name": "f", "arguments": arguments}
    yield "responses", {"input": [USER, item]}
    used = {"type": "tool_use", "id": "1", "name": "f", "input": arguments}
    made = {"role": "assistant", "content": [used]}
    yield "messages", {"messages": [USER, made], "max_tokens": 5}


def places(deep: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """All others."""
    yield from calls(deep)
    function = {"name": "f", "parameters": deep}
    format_ = {"type": "json_schema", "name": "a", "schema": deep}
    for content in (deep, [deep], [{"type": "text", "text": "a", "x": deep}]):
        yield "chat/completions", {"messages": [{"role": "user", "content": content}]}
        yield "messages", {"messages": [{"role": "user", "content": content}], "max_tokens": 5}
        yield "responses", {"input": [{"role": "user", "content": content}]}
    yield (
        "chat/completions",
        {"messages": [USER], "tools": [{"type": "function", "function": function}]},
    )
    yield (
        "chat/completions",
        {"messages": [USER], "response_format": {**format_, "json_schema": format_}},
    )
    yield "chat/completions", {"messages": [{**USER, "reasoning_details": [deep]}], "trace": deep}
    yield "responses", {"input": "hi", "tools": [{"type": "function", **function}]}
    yield "responses", {"input": "hi", "text": {"format": format_}, "metadata": deep}
    used = {"type": "tool_use", "id": "1", "name": "f", "input": deep}
    yield (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": [used]}], "max_tokens": 5},
    )
    tools = [{"name": "f", "input_schema": deep}]
    yield "messages", {"messages": [USER], "max_tokens": 5, "tools": tools}
    yield "completions", {"prompt": "hi", "logit_bias": deep, "x": deep}


@pytest.fixture
def app(chat: Chat) -> App:
    return App(Catalog([Served("tiny", chat, ScriptedEngine(able=["grammar", "logprobs"]), 0)]))


def status(app: App, path: str, body: str) -> int:
    return asyncio.run(ask(app, "POST", f"/v1/{path}", {}, body.encode())).status


@pytest.mark.parametrize(("begin", "end"), LEVELS.values(), ids=LEVELS)
def test_what_is_nested_deeply_is_refused_wherever_it_stands(
    begin: str, end: str, app: App
) -> None:
    # Within the bound, beyond it, and beyond what is read at all.
    for depth, statuses in ((60, {200, 400}), (MAX_DEPTH, {400}), (2000, {400})):
        deep = begin * depth + "{}" + end * depth
        asked = [(path, json.dumps(body)) for path, body in places("@deep@")]
        told = {status(app, path, body.replace('"@deep@"', deep)) for path, body in asked}
        assert told == statuses, depth


@pytest.mark.parametrize(("begin", "end"), LEVELS.values(), ids=LEVELS)
def test_a_text_may_hold_any_json(begin: str, end: str, app: App) -> None:
    for depth in (60, 500, 900, 1000, 100_000):
        for path, body in calls(begin * depth + "{}" + end * depth):
            assert status(app, path, json.dumps(body)) in (200, 400), (path, depth)


def test_levels_are_counted_whatever_stands_in_them() -> None:
    nested: Any = {}
    for depth in range(1, 200):
        assert [is_deeper(nested, depth - 1), is_deeper(nested, depth)] == [True, False]
        nested = [1, {"b": "{["}, nested] if depth % 2 else {"a": nested, "b": None}
