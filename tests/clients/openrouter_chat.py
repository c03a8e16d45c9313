"""The API through OpenRouter's own client; the same program for the 1.3 and the 0.11 line."""

import json
from typing import Any

import dialogue
from openrouter import OpenRouter
from openrouter.errors import BadRequestResponseError
from openrouter.utils import BackoffStrategy, RetryConfig

# Not for an hour, as by default. That it gives up after five silent seconds is left as it is.
PATIENCE: dict[str, Any] = {
    "retry_config": RetryConfig("none", BackoffStrategy(1, 1, 1, 1), False),
}


def chat(client: OpenRouter) -> str:
    reply = client.chat.send(
        model=dialogue.MODEL, messages=dialogue.user(dialogue.QUESTION), temperature=0
    )
    message = reply.choices[0].message
    assert (message.reasoning, message.content) == (dialogue.THOUGHT, dialogue.ANSWER)
    assert message.reasoning_details[0].text == dialogue.THOUGHT
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0
    direct = client.chat.send(
        model=dialogue.MODEL,
        messages=dialogue.user(dialogue.QUESTION),
        temperature=0,
        reasoning={"effort": "none"},
    )
    assert (direct.choices[0].message.reasoning, direct.choices[0].message.content) == (
        None,
        dialogue.ANSWER,
    )
    return str(reply.id)


def stream(client: OpenRouter) -> None:
    reasoning = answer = ""
    finishes, usages = [], []
    with client.chat.send(
        model=dialogue.MODEL, messages=dialogue.user(dialogue.QUESTION), temperature=0, stream=True
    ) as chunks:
        for chunk in chunks:
            usages += [chunk.usage] if chunk.usage else []
            for choice in chunk.choices:
                reasoning += choice.delta.reasoning or ""
                answer += choice.delta.content or ""
                finishes += [choice.finish_reason] if choice.finish_reason else []
    assert (reasoning, answer, finishes) == (dialogue.THOUGHT, dialogue.ANSWER, ["stop"])
    assert [usage.total_tokens > 0 for usage in usages] == [True]


def call_tools(client: OpenRouter) -> None:
    asked = client.chat.send(
        model=dialogue.MODEL,
        messages=dialogue.user(dialogue.WEATHER),
        tools=dialogue.TOOLS,
        temperature=0,
    )
    message = asked.choices[0].message
    (call,) = message.tool_calls
    assert message.reasoning == dialogue.CALL_THOUGHT
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == dialogue.ARGUMENTS
    assert asked.choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": dialogue.RESULT}
    history = [*dialogue.user(dialogue.WEATHER), message.model_dump(exclude_none=True), result]
    told = client.chat.send(
        model=dialogue.MODEL, messages=history, tools=dialogue.TOOLS, temperature=0
    )
    message = told.choices[0].message
    assert (message.reasoning, message.content) == (dialogue.RESULT_THOUGHT, dialogue.RESULT_ANSWER)


def keep_a_schema(client: OpenRouter) -> None:
    form = {"name": "place", "strict": True, "schema": dialogue.SCHEMA}
    reply = client.chat.send(
        model=dialogue.MODEL,
        messages=dialogue.user(dialogue.DESCRIBE),
        response_format={"type": "json_schema", "json_schema": form},
        temperature=0,
    )
    assert json.loads(reply.choices[0].message.content) == dialogue.OSLO


def be_refused(client: OpenRouter) -> None:
    refusal = ""
    try:
        client.chat.send(model=dialogue.NOBODY, messages=dialogue.user(dialogue.QUESTION))
    except BadRequestResponseError as error:
        refusal = str(error)
    assert dialogue.REFUSAL in refusal


def look_around(client: OpenRouter, generation: str) -> None:
    listed = client.models.list()
    models = listed.result.data if hasattr(listed, "result") else listed.data
    assert dialogue.MODEL in [model.id for model in models]
    assert client.models.count().data.count == len(models)
    (endpoint,) = client.endpoints.list(author=dialogue.AUTHOR, slug=dialogue.SLUG).data.endpoints
    assert endpoint.context_length > 0
    assert client.providers.list().data
    told = client.generations.get_generation(id=generation).data
    assert (told.id, told.model, told.finish_reason) == (generation, dialogue.MODEL, "stop")
    assert client.api_keys.get_current_key_metadata().data.label.startswith("sk-or-v1-")
    assert client.credits.get_credits().data.total_usage >= 0


with OpenRouter(api_key=dialogue.KEY, server_url=dialogue.URL, **PATIENCE) as client:
    generation = chat(client)
    stream(client)
    call_tools(client)
    keep_a_schema(client)
    be_refused(client)
    look_around(client, generation)
