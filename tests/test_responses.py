"""/responses over HTTP, as the official client asks for it."""

import json
from typing import Any

import openai
import pytest
from asking import Server
from scripted import ScriptedEngine

from pipeline.chat import Chat

TOOL: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
THOUGHT = ["<think>", "\nhm\n", "</think>", "\n\n", "ye", "s"]


def client(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/api/v1", api_key="any", max_retries=0)


def ask(base: str, **fields: Any) -> tuple[int, Any, Any]:
    """Status, headers and body of an answer, as JSON or, of a stream, as text."""
    with Server(f"{base}/api/v1").post({"input": "hi", **fields}, "/responses") as response:
        data = response.read().decode()
        is_stream = response.headers["Content-Type"] == "text/event-stream"
        return response.status, response.headers, data if is_stream else json.loads(data)


def test_the_official_client_reads_a_response(serving: Any) -> None:
    with serving(ScriptedEngine(THOUGHT)) as base, client(base) as asking:
        response = asking.responses.create(model="tiny", input="hi", store=False)

    thought, said = response.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert [part.text for part in thought.content] == ["hm"]
    assert (said.type, response.output_text, response.status) == ("message", "yes", "completed")
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == 3
    assert response.usage.input_tokens_details.cached_tokens == 3
    assert response.id.startswith("gen-")


def test_the_official_client_follows_a_stream(serving: Any) -> None:
    engine = ScriptedEngine([*THOUGHT, CALL])
    with serving(engine) as base, client(base) as asking:
        stream = asking.responses.stream(model="tiny", input="hi", tools=[TOOL])
        with stream as events:
            told = list(events)
            final = events.get_final_response()

    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output_text == "yes"
    texts = [event.delta for event in told if event.type == "response.output_text.delta"]
    assert "".join(texts) == "yes"
    arguments = [e.arguments for e in told if e.type == "response.function_call_arguments.done"]
    assert [json.loads(text) for text in arguments] == [{"a": 1}]
    assert [event.sequence_number for event in told] == list(range(len(told)))


def test_a_tool_loop_gives_the_thought_back_as_a_chat_does(serving: Any, chat: Chat) -> None:
    function = {"name": "f", "parameters": {"type": "object"}, "strict": True}
    engine = ScriptedEngine([*THOUGHT[:3], CALL])
    with serving(engine) as base, client(base) as asking:
        question: Any = {"role": "user", "content": "hi"}
        first = asking.responses.create(model="tiny", input=[question], tools=[TOOL])
        call = first.output[-1]
        assert call.type == "function_call"
        answered = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
        items: Any = [question, *(item.to_dict() for item in first.output), answered]
        asking.responses.create(model="tiny", input=items, tools=[TOOL])
        asking.chat.completions.create(
            model="tiny",
            tools=[{"type": "function", "function": function}],  # type: ignore[typeddict-item]
            messages=[
                question,
                {
                    "role": "assistant",
                    "reasoning": "hm",
                    "tool_calls": [
                        {
                            "id": call.call_id,
                            "type": "function",
                            "function": {"name": "f", "arguments": call.arguments},
                        }
                    ],
                },  # type: ignore[list-item]
                {"role": "tool", "tool_call_id": call.call_id, "content": "42"},
            ],
        )

    _, of_items, of_messages = (prompt for prompt, _ in engine.asked)
    assert of_items == of_messages
    assert "<think>\nhm\n</think>" in chat.decode(of_items)


def test_a_form_is_asked_of_the_engine(serving: Any) -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}
    engine = ScriptedEngine(["{}"], able=["grammar"])
    with serving(engine) as base:
        status, _, body = ask(base, text={"format": form}, reasoning={"enabled": False})

    assert (status, body["output_text"]) == (200, "{}")
    assert engine.asked[0][1].grammar is not None
    assert body["text"] == {"format": form}


def test_what_is_ignored_is_named(serving: Any) -> None:
    with serving(ScriptedEngine()) as base:
        _, headers, _ = ask(base, max_tool_calls=3, include=["reasoning.encrypted_content"])

    assert sorted(headers["X-Ignored-Parameters"].split(", ")) == ["include", "max_tool_calls"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_before_the_first_token_is_an_http_error(serving: Any, stream: bool) -> None:
    with serving(ScriptedEngine(["a"], fails_at=0)) as base:
        status, _, body = ask(base, stream=stream)

    assert (status, body["error"]["code"]) == (502, 502)
    assert body["error_type"] == "provider_unavailable"


def test_a_failure_after_the_first_token_is_a_response_that_failed(serving: Any) -> None:
    with serving(ScriptedEngine(["a", "b"], fails_at=1)) as base:
        _, _, stream = ask(base, stream=True)
        status, _, body = ask(base)

    assert (status, body["status"], body["output_text"]) == (200, "failed", "a")
    assert body["error"] == {"code": "server_error", "message": "Provider returned error"}
    *_, last, done, _ = stream.split("\n\n")
    assert last.startswith("event: response.failed\n")
    assert done == "data: [DONE]"


def test_what_is_no_request_of_this_dialect_is_refused_as_one(serving: Any) -> None:
    image = {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}
    with serving(ScriptedEngine()) as base, client(base) as asking:
        unstored = ask(base, store=True)
        unseen = ask(base, input=[image])
        with pytest.raises(openai.BadRequestError) as caught:
            asking.responses.create(model="tiny", input="hi", previous_response_id="resp_1")

    assert (unstored[0], unstored[2]["error_type"]) == (400, "invalid_request")
    assert unseen[0] == 404
    assert unseen[2]["error"]["message"].startswith("No endpoints found that support image input")
    assert "previous_response_id" in caught.value.message
