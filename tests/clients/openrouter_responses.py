"""The responses API through OpenRouter's own client; the same program for both of its lines."""

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
TOOLS: list[Any] = [
    {"type": "function", "name": name, "description": text, "parameters": dialogue.CITY}
    for name, text in dialogue.ABOUT.items()
]


def respond(client: OpenRouter) -> None:
    reply = client.beta.responses.send(model=dialogue.MODEL, input=dialogue.QUESTION, temperature=0)
    assert reply.status == "completed"
    assert (thought_of(reply), answer_of(reply)) == (dialogue.THOUGHT, dialogue.ANSWER)
    assert reply.usage.output_tokens_details.reasoning_tokens > 0


def stream(client: OpenRouter) -> None:
    thought = answer = ""
    with client.beta.responses.send(
        model=dialogue.MODEL, input=dialogue.QUESTION, temperature=0, stream=True
    ) as events:
        for event in events:
            if event.type == "response.reasoning_text.delta":
                thought += event.delta
            if event.type == "response.output_text.delta":
                answer += event.delta
    assert (thought, answer) == (dialogue.THOUGHT, dialogue.ANSWER)
    assert event.type == "response.completed"
    assert answer_of(event.response) == dialogue.ANSWER


def call_tools(client: OpenRouter) -> None:
    question = {"type": "message", "role": "user", "content": dialogue.WEATHER}
    order = {"model": dialogue.MODEL, "tools": TOOLS, "temperature": 0}
    asked = client.beta.responses.send(input=[question], **order)
    assert thought_of(asked) == dialogue.CALL_THOUGHT
    call = asked.output[-1]
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert json.loads(call.arguments) == dialogue.ARGUMENTS
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": dialogue.RESULT,
    }
    output = [item.model_dump(exclude_none=True) for item in asked.output]
    told = client.beta.responses.send(input=[question, *output, result], **order)
    thought_and_answer = (thought_of(told), answer_of(told))
    assert thought_and_answer == (dialogue.RESULT_THOUGHT, dialogue.RESULT_ANSWER)


def keep_a_schema(client: OpenRouter) -> None:
    form = {"type": "json_schema", "name": "place", "strict": True, "schema": dialogue.SCHEMA}
    reply = client.beta.responses.send(
        model=dialogue.MODEL, input=dialogue.DESCRIBE, text={"format": form}, temperature=0
    )
    assert json.loads(answer_of(reply)) == dialogue.OSLO


def be_refused(client: OpenRouter) -> None:
    refusal = ""
    try:
        client.beta.responses.send(model=dialogue.NOBODY, input=dialogue.QUESTION)
    except BadRequestResponseError as error:
        refusal = str(error)
    assert dialogue.REFUSAL in refusal


def thought_of(reply: Any) -> str:
    return text_of(reply, "reasoning")


def answer_of(reply: Any) -> str:
    return text_of(reply, "message")


def text_of(reply: Any, kind: str) -> str:
    return "".join(part.text for item in reply.output if item.type == kind for part in item.content)


with OpenRouter(api_key=dialogue.KEY, server_url=dialogue.URL, **PATIENCE) as client:
    respond(client)
    stream(client)
    call_tools(client)
    keep_a_schema(client)
    be_refused(client)
