"""Design law 4: what the server asks an engine to continue is what was trained for that history."""

import http.client
import json
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.data.conversation import Record
from pipeline.data.formats import detect, parse
from pipeline.data.notes import Notes
from pipeline.data.rows import make_rows
from pipeline.recipe import Data

USER = {"role": "user", "content": "Wie viel ist 1+1? 🙂\r\n你好"}
DIRECT = {"role": "assistant", "content": "2"}
THOUGHT = {"role": "assistant", "content": "2", "reasoning": "One and\n\none."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter — 天気",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object"}},
        "cache_control": {"type": "ephemeral"},
    },
]


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        **more,
    }


def result(content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c1", "content": content}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [USER, DIRECT],
    "thinking": [USER, THOUGHT, USER, THOUGHT, USER, DIRECT],
    "system": [{"role": "system", "content": "Be brief."}, USER, THOUGHT, USER, DIRECT],
    "developer": [{"role": "developer", "content": "Be brief."}, USER, DIRECT],
    "two systems": [
        {"role": "system", "content": "Be brief."},
        USER,
        DIRECT,
        {"role": "system", "content": "Now be long."},
        USER,
        THOUGHT,
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
        USER,
        DIRECT,
    ],
    "think block in the content": [
        USER,
        {"role": "assistant", "content": "<think>\nOne.\n</think>\n\n2"},
        USER,
        {"role": "assistant", "content": "<think>\n\n</think>\n\n2"},
        USER,
        DIRECT,
    ],
    "a tag in prose": [
        {"role": "user", "content": "What is </think>? And <think>?"},
        {
            "role": "assistant",
            "content": "A tag </think> that ends <think>.",
            "reasoning": "</think>",
        },
        USER,
        DIRECT,
    ],
    "control tokens in a question": [
        {"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\nYes<|endoftext|>"},
        DIRECT,
        USER,
        THOUGHT,
    ],
    "details": [
        USER,
        DIRECT | {"reasoning_details": [{"type": "reasoning.text", "text": "One and one."}]},
        USER,
        DIRECT | {"reasoning": "  \n"},
    ],
    "a chain of calls": [
        USER,
        call("weather", '{"city": "Zürich", "n": [1, 2.50]}', reasoning="Look."),
        result("sunny <|im_end|> </tool_response>"),
        call("now", {"zone": "東京"}, content="Wait."),
        result([{"type": "text", "text": "12:00"}]),
        THOUGHT,
        USER,
        DIRECT,
    ],
    "parallel calls": [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}},
                {"id": "b", "type": "function", "function": {"name": "now", "arguments": ""}},
            ],
        },
        result("1"),
        result("2"),
        DIRECT,
    ],
}


def post(base: str, body: Any) -> None:
    connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=10)
    try:
        connection.request("POST", "/api/v1/chat/completions", json.dumps(body).encode())
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_server_asks_for_what_was_trained(
    chat: Chat, serving: Any, name: str, tools: list[Any] | None
) -> None:
    messages = CONVERSATIONS[name]
    # As a file would hold it.
    value = json.loads(json.dumps({"messages": messages, "tools": tools}))
    record = Record(value, Path("chats.jsonl"), 1)
    sample = parse(record, detect(record))
    data = Data(sources=[{"path": "x"}])
    engine = ScriptedEngine()
    engine.context_tokens = 100_000

    rows = make_rows(sample, chat, data, 42, Notes())
    with serving(engine) as base:
        for row in rows:
            body: dict[str, Any] = {
                "messages": messages[: row.turn],
                "reasoning": {"enabled": row.mode == "thinking"},
            }
            post(base, body | ({"tools": tools} if tools else {}))

    assert rows
    # A reply that does not begin with the thought it was asked for is asked for anew.
    prompts = [prompt for prompt, _ in groupby(prompt for prompt, _ in engine.asked)]
    assert prompts == [row.prompt_ids for row in rows]
