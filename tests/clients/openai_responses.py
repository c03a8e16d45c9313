"""The responses API through the client of OpenAI; nothing is stored, so all is handed back."""

import json
from typing import Any

import dialogue
from openai import BadRequestError, OpenAI

TOOLS: list[Any] = [
    {"type": "function", "name": name, "description": text, "parameters": dialogue.CITY}
    for name, text in dialogue.ABOUT.items()
]


def respond(client: OpenAI) -> None:
    reply = client.responses.create(model=dialogue.MODEL, input=dialogue.QUESTION, temperature=0)
    assert reply.status == "completed"
    assert [item.type for item in reply.output] == ["reasoning", "message"]
    assert thought_of(reply) == dialogue.THOUGHT
    assert reply.output_text == dialogue.ANSWER
    assert reply.usage.output_tokens_details.reasoning_tokens > 0
    direct = client.responses.create(
        model=dialogue.MODEL,
        input=dialogue.QUESTION,
        reasoning={"effort": "none"},
        temperature=0,
    )
    assert [item.type for item in direct.output] == ["message"]
    assert direct.output_text == dialogue.ANSWER


def stream(client: OpenAI) -> None:
    """The client's own helper, which puts the events together."""
    thought, answer = [], []
    with client.responses.stream(
        model=dialogue.MODEL, input=dialogue.QUESTION, temperature=0
    ) as events:
        for event in events:
            if event.type == "response.reasoning_text.delta":
                thought.append(event.delta)
            if event.type == "response.output_text.delta":
                answer.append(event.delta)
        reply = events.get_final_response()
    assert ("".join(thought), "".join(answer)) == (dialogue.THOUGHT, dialogue.ANSWER)
    assert (thought_of(reply), reply.output_text) == (dialogue.THOUGHT, dialogue.ANSWER)
    assert reply.usage.total_tokens > 0


def call_tools(client: OpenAI) -> None:
    """Both of a call that came whole, and of one that was streamed."""
    question = dialogue.user(dialogue.WEATHER)
    order = {"model": dialogue.MODEL, "tools": TOOLS, "temperature": 0}
    whole = client.responses.create(input=question, **order)
    with client.responses.stream(input=question, **order) as events:
        streamed = events.get_final_response()
    for asked in (whole, streamed):
        thinking, call = asked.output
        assert thought_of(asked) == dialogue.CALL_THOUGHT
        assert (thinking.type, call.type, call.name) == (
            "reasoning",
            "function_call",
            "get_weather",
        )
        assert json.loads(call.arguments) == dialogue.ARGUMENTS
        result = {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": dialogue.RESULT,
        }
        told = client.responses.create(input=[*question, *asked.output, result], **order)
        thought_and_answer = (thought_of(told), told.output_text)
        assert thought_and_answer == (dialogue.RESULT_THOUGHT, dialogue.RESULT_ANSWER)


def keep_a_schema(client: OpenAI) -> None:
    form = {"type": "json_schema", "name": "place", "strict": True, "schema": dialogue.SCHEMA}
    reply = client.responses.create(
        model=dialogue.MODEL, input=dialogue.DESCRIBE, text={"format": form}, temperature=0
    )
    assert json.loads(reply.output_text) == dialogue.OSLO


def be_refused(client: OpenAI) -> None:
    refusal = ""
    try:
        client.responses.create(model=dialogue.NOBODY, input=dialogue.QUESTION)
    except BadRequestError as error:
        refusal = str(error)
    assert dialogue.REFUSAL in refusal


def thought_of(reply: Any) -> str:
    return "".join(
        part.text for item in reply.output if item.type == "reasoning" for part in item.content
    )


with OpenAI(api_key=dialogue.KEY, base_url=dialogue.URL, max_retries=0) as client:
    respond(client)
    stream(client)
    call_tools(client)
    keep_a_schema(client)
    be_refused(client)
