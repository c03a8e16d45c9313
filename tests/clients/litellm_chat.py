"""The chat API through litellm, which finds address and key in the environment by itself."""

import json

import dialogue
import litellm

MODEL = f"openrouter/{dialogue.MODEL}"


def chat() -> None:
    reply = litellm.completion(MODEL, dialogue.user(dialogue.QUESTION), temperature=0)
    message = reply.choices[0].message
    assert (message.reasoning_content, message.content) == (dialogue.THOUGHT, dialogue.ANSWER)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0


def stream() -> None:
    chunks = litellm.completion(MODEL, dialogue.user(dialogue.QUESTION), temperature=0, stream=True)
    reply = litellm.stream_chunk_builder(list(chunks))
    message = reply.choices[0].message
    assert (message.reasoning_content, message.content) == (dialogue.THOUGHT, dialogue.ANSWER)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens > 0


def call_tools() -> None:
    question = dialogue.user(dialogue.WEATHER)
    asked = litellm.completion(MODEL, question, tools=dialogue.TOOLS, temperature=0)
    message = asked.choices[0].message
    (call,) = message.tool_calls
    assert message.reasoning_content == dialogue.CALL_THOUGHT
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == dialogue.ARGUMENTS
    assert asked.choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": dialogue.RESULT}
    told = litellm.completion(
        MODEL, [*question, message, result], tools=dialogue.TOOLS, temperature=0
    )
    message = told.choices[0].message
    thought_and_answer = (message.reasoning_content, message.content)
    assert thought_and_answer == (dialogue.RESULT_THOUGHT, dialogue.RESULT_ANSWER)


def keep_a_schema() -> None:
    form = {"name": "place", "strict": True, "schema": dialogue.SCHEMA}
    reply = litellm.completion(
        MODEL,
        dialogue.user(dialogue.DESCRIBE),
        response_format={"type": "json_schema", "json_schema": form},
        temperature=0,
    )
    assert json.loads(reply.choices[0].message.content) == dialogue.OSLO


chat()
stream()
call_tools()
keep_a_schema()
