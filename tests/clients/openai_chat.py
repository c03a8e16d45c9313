"""The chat API through the client of OpenAI: what it has no word for goes into `extra_body`."""

import json

import dialogue
from openai import BadRequestError, OpenAI


def chat(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model=dialogue.MODEL, messages=dialogue.user(dialogue.QUESTION), temperature=0
    )
    message = reply.choices[0].message
    assert (message.reasoning, message.content) == (dialogue.THOUGHT, dialogue.ANSWER)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0
    direct = client.chat.completions.create(
        model=dialogue.MODEL,
        messages=dialogue.user(dialogue.QUESTION),
        temperature=0,
        extra_body={"reasoning": {"enabled": False}},
    )
    message = direct.choices[0].message
    assert (message.reasoning, message.content) == (None, dialogue.ANSWER)
    assert direct.usage.completion_tokens_details.reasoning_tokens == 0


def stream(client: OpenAI) -> None:
    """The client's own helper, which puts the chunks together."""
    with client.chat.completions.stream(
        model=dialogue.MODEL, messages=dialogue.user(dialogue.QUESTION), temperature=0
    ) as events:
        texts = [event.delta for event in events if event.type == "content.delta"]
        reply = events.get_final_completion()
    message = reply.choices[0].message
    assert "".join(texts) == dialogue.ANSWER
    assert (message.reasoning, message.content) == (dialogue.THOUGHT, dialogue.ANSWER)
    assert reply.usage.total_tokens > 0


def call_tools(client: OpenAI) -> None:
    question = dialogue.user(dialogue.WEATHER)
    asked = client.chat.completions.create(
        model=dialogue.MODEL, messages=question, tools=dialogue.TOOLS, temperature=0
    )
    message = asked.choices[0].message
    (call,) = message.tool_calls
    assert message.reasoning == dialogue.CALL_THOUGHT
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == dialogue.ARGUMENTS
    assert asked.choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": dialogue.RESULT}
    told = client.chat.completions.create(
        model=dialogue.MODEL,
        messages=[*question, message, result],
        tools=dialogue.TOOLS,
        temperature=0,
    )
    message = told.choices[0].message
    thought_and_answer = (message.reasoning, message.content)
    assert thought_and_answer == (dialogue.RESULT_THOUGHT, dialogue.RESULT_ANSWER)


def keep_a_schema(client: OpenAI) -> None:
    form = {"name": "place", "strict": True, "schema": dialogue.SCHEMA}
    reply = client.chat.completions.create(
        model=dialogue.MODEL,
        messages=dialogue.user(dialogue.DESCRIBE),
        response_format={"type": "json_schema", "json_schema": form},
        temperature=0,
    )
    assert json.loads(reply.choices[0].message.content) == dialogue.OSLO


def be_refused(client: OpenAI) -> None:
    refusal = ""
    try:
        client.chat.completions.create(
            model=dialogue.NOBODY, messages=dialogue.user(dialogue.QUESTION)
        )
    except BadRequestError as error:
        refusal = str(error)
    assert dialogue.REFUSAL in refusal


def list_models(client: OpenAI) -> None:
    assert dialogue.MODEL in [model.id for model in client.models.list()]


with OpenAI(api_key=dialogue.KEY, base_url=dialogue.URL, max_retries=0) as client:
    chat(client)
    stream(client)
    call_tools(client)
    keep_a_schema(client)
    be_refused(client)
    list_models(client)
