"""The messages API through the client of Anthropic, which adds `/v1/messages` to an address."""

import json
from typing import Any

import dialogue
from anthropic import Anthropic, BadRequestError

TOOLS: list[Any] = [
    {"name": name, "description": text, "input_schema": dialogue.CITY}
    for name, text in dialogue.ABOUT.items()
]
ORDER: dict[str, Any] = {
    "model": dialogue.MODEL,
    "max_tokens": 2048,
    "extra_body": {"temperature": 0},  # this version of the client has no word for it
    "thinking": {"type": "enabled", "budget_tokens": 1024},
}


def ask(client: Anthropic) -> None:
    reply = client.messages.create(messages=dialogue.user(dialogue.QUESTION), **ORDER)
    thinking, text = reply.content
    assert (thinking.type, thinking.thinking) == ("thinking", dialogue.THOUGHT)
    assert (text.type, text.text) == ("text", dialogue.ANSWER)
    assert reply.stop_reason == "end_turn"
    assert reply.usage.input_tokens > 0
    assert reply.usage.output_tokens > 0
    direct = client.messages.create(
        messages=dialogue.user(dialogue.QUESTION), **ORDER | {"thinking": {"type": "disabled"}}
    )
    assert [block.text for block in direct.content] == [dialogue.ANSWER]


def stream(client: Anthropic) -> None:
    """The client's own helper, which puts the events together."""
    with client.messages.stream(messages=dialogue.user(dialogue.QUESTION), **ORDER) as events:
        parts = [(event.type, event) for event in events]
        reply = events.get_final_message()
    thought = "".join(event.thinking for kind, event in parts if kind == "thinking")
    answer = "".join(event.text for kind, event in parts if kind == "text")
    assert (thought, answer) == (dialogue.THOUGHT, dialogue.ANSWER)
    thinking, text = reply.content
    assert (thinking.thinking, text.text) == (dialogue.THOUGHT, dialogue.ANSWER)
    assert reply.stop_reason == "end_turn"
    assert reply.usage.output_tokens > 0


def call_tools(client: Anthropic) -> None:
    """Both of a call that came whole, and of one that was streamed."""
    question = dialogue.user(dialogue.WEATHER)
    whole = client.messages.create(messages=question, tools=TOOLS, **ORDER)
    with client.messages.stream(messages=question, tools=TOOLS, **ORDER) as events:
        streamed = events.get_final_message()
    for asked in (whole, streamed):
        thinking, call = asked.content
        assert thinking.thinking == dialogue.CALL_THOUGHT
        assert (call.type, call.name, call.input) == (
            "tool_use",
            "get_weather",
            dialogue.ARGUMENTS,
        )
        assert asked.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": dialogue.RESULT}
        history = [
            *question,
            {"role": "assistant", "content": asked.content},
            {"role": "user", "content": [result]},
        ]
        told = client.messages.create(messages=history, tools=TOOLS, **ORDER)
        thinking, text = told.content
        thought_and_answer = (thinking.thinking, text.text)
        assert thought_and_answer == (dialogue.RESULT_THOUGHT, dialogue.RESULT_ANSWER)


def keep_a_schema(client: Anthropic) -> None:
    reply = client.messages.create(
        messages=dialogue.user(dialogue.DESCRIBE),
        output_config={"format": {"type": "json_schema", "schema": dialogue.SCHEMA}},
        **ORDER,
    )
    assert json.loads(reply.content[-1].text) == dialogue.OSLO


def be_refused(client: Anthropic) -> None:
    refusal = ""
    try:
        client.messages.create(
            messages=dialogue.user(dialogue.QUESTION), **ORDER | {"model": dialogue.NOBODY}
        )
    except BadRequestError as error:
        refusal = str(error)
    assert dialogue.REFUSAL in refusal


address = dialogue.URL.removesuffix("/v1")
with Anthropic(base_url=address, auth_token=dialogue.KEY, max_retries=0) as client:
    ask(client)
    stream(client)
    call_tools(client)
    keep_a_schema(client)
    be_refused(client)
with Anthropic(base_url=address, api_key=dialogue.KEY, max_retries=0) as client:
    ask(client)
