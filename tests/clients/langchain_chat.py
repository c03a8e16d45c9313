"""The chat API through LangChain, which finds address and key in the environment by itself."""

import dialogue
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openrouter import ChatOpenRouter


def chat(model: ChatOpenRouter) -> None:
    reply = model.invoke(dialogue.QUESTION)
    thought = reply.additional_kwargs["reasoning_content"]
    assert (thought, reply.content) == (dialogue.THOUGHT, dialogue.ANSWER)
    assert reply.response_metadata["finish_reason"] == "stop"
    assert reply.usage_metadata["output_token_details"]["reasoning"] > 0


def stream(model: ChatOpenRouter) -> None:
    first, *rest = model.stream(dialogue.QUESTION)
    reply = sum(rest, first)
    thought = reply.additional_kwargs["reasoning_content"]
    assert (thought, reply.content) == (dialogue.THOUGHT, dialogue.ANSWER)
    assert reply.usage_metadata["total_tokens"] > 0


def call_tools(model: ChatOpenRouter) -> None:
    """Also with a call that was streamed: its reasoning goes back in many pieces."""
    model = model.bind_tools(dialogue.TOOLS)
    question = HumanMessage(dialogue.WEATHER)
    first, *rest = model.stream([question])
    for asked in (model.invoke([question]), sum(rest, first)):
        (call,) = asked.tool_calls
        assert asked.additional_kwargs["reasoning_content"] == dialogue.CALL_THOUGHT
        assert (call["name"], call["args"]) == ("get_weather", dialogue.ARGUMENTS)
        result = ToolMessage(dialogue.RESULT, tool_call_id=call["id"])
        told = model.invoke([question, asked, result])
        thought = told.additional_kwargs["reasoning_content"]
        assert (thought, told.content) == (dialogue.RESULT_THOUGHT, dialogue.RESULT_ANSWER)


def keep_a_schema(model: ChatOpenRouter) -> None:
    schema = {"title": "place", **dialogue.SCHEMA}
    place = model.with_structured_output(schema, method="json_schema", strict=True)
    assert place.invoke(dialogue.DESCRIBE) == dialogue.OSLO


# 0 retries are none of its own, which leaves those of the client below it: an hour's.
model = ChatOpenRouter(model=dialogue.MODEL, temperature=0, max_retries=1)
chat(model)
stream(model)
call_tools(model)
keep_a_schema(model)
