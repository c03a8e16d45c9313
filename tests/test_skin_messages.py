"""Anthropic's dialect as it is read: its words, in those of chat/completions."""

import json
from typing import Any

import pytest

from pipeline.errors import RequestError
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.skins.messages import Messages

MESSAGES = Messages()
USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"name": "f", "description": "d", "input_schema": SCHEMA}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "7"}


def read(*messages: Any, **fields: Any) -> ChatRequest:
    return MESSAGES.read({"messages": list(messages) or [USER], **fields})


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def reasoning(**fields: Any) -> dict[str, Any] | None:
    asked = read(**fields).reasoning
    return None if asked is None else asked.model_dump(exclude_none=True)


@pytest.mark.parametrize("system", ["be kind", text("be kind")])
def test_a_system_text_is_the_first_message(system: Any) -> None:
    first = {"role": "system", "content": text("be kind")}
    assert read(system=system).messages == [first, {"role": "user", "content": text("hi")}]


def test_system_messages_may_stand_among_the_others() -> None:
    later = {"role": "system", "content": "be brief"}
    roles = [message["role"] for message in read(USER, later).messages or []]
    assert roles == ["user", "system"]


def test_a_turn_of_the_assistant_keeps_its_thought_its_text_and_its_calls() -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "I call.", "citations": None},
        {**CALL, "caller": {"type": "direct"}},
        {**CALL, "id": "toolu_2"},
    ]
    request = read(USER, {"role": "assistant", "content": blocks}, {"role": "user", "content": "?"})

    assert request.messages is not None
    turn = request.messages[1]
    calls = turn.pop("tool_calls")
    assert turn == {"role": "assistant", "content": text("I call."), "reasoning": "hm"}
    assert [call["id"] for call in calls] == ["toolu_1", "toolu_2"]
    assert calls[0]["function"]["name"] == "f"
    assert json.loads(calls[0]["function"]["arguments"]) == {"a": 1}
    assert request.model_extra == {}, "what we send ourselves must not be named as ignored"


def test_results_of_calls_are_messages_and_come_before_what_the_user_says() -> None:
    failed = {**RESULT, "tool_use_id": "toolu_2", "content": text("no"), "is_error": True}
    bare = {"type": "tool_result", "tool_use_id": "toolu_3"}
    content = [*text("so"), RESULT, failed, bare, *text("go on")]

    assert read({"role": "user", "content": content}).messages == [
        {"role": "tool", "tool_call_id": "toolu_1", "content": text("7")},
        {"role": "tool", "tool_call_id": "toolu_2", "content": text("Error: ", "no")},
        {"role": "tool", "tool_call_id": "toolu_3", "content": []},
        {"role": "user", "content": text("so", "go on")},
    ]
    only_results = read({"role": "user", "content": [RESULT]}).messages or []
    assert [message["role"] for message in only_results] == ["tool"]


@pytest.mark.parametrize(("kind", "name"), [("image", "image_url"), ("document", "file")])
def test_what_is_no_text_is_left_for_the_refusal_of_a_chat(kind: str, name: str) -> None:
    block = {"type": kind, "source": {"type": "base64", "data": "AA=="}}
    in_message = read({"role": "user", "content": [block]}).messages or []
    in_result = read({"role": "user", "content": [{**RESULT, "content": [block]}]}).messages or []

    assert in_message[0]["content"] == in_result[0]["content"] == [{"type": name}]


def test_a_last_turn_of_the_assistant_stays_last_to_be_continued() -> None:
    begun = {"role": "assistant", "content": "It is"}
    assert (read(USER, begun).messages or [])[-1] == {"role": "assistant", "content": text("It is")}


def test_tools_are_functions() -> None:
    function = {"name": "f", "description": "d", "parameters": SCHEMA}
    strict = {**TOOL, "type": "custom", "strict": True, "cache_control": {"type": "ephemeral"}}
    assert read(tools=[TOOL, strict]).tools == [
        {"type": "function", "function": function},
        {"type": "function", "function": {**function, "strict": True}},
    ]


@pytest.mark.parametrize(
    ("choice", "expected"), [("auto", "auto"), ("any", "required"), ("none", "none")]
)
def test_a_choice_of_tools_is_translated(choice: str, expected: str) -> None:
    request = read(tools=[TOOL], tool_choice={"type": choice})
    assert (request.tool_choice, request.parallel_tool_calls) == (expected, None)


def test_one_tool_may_be_named_and_calls_kept_to_one() -> None:
    choice = {"type": "tool", "name": "f", "disable_parallel_tool_use": True}
    request = read(tools=[TOOL], tool_choice=choice)
    assert getattr(request.tool_choice, "function").name == "f"  # noqa: B009 - a union
    assert request.parallel_tool_calls is False


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, {"max_tokens": 9}),
        ({"thinking": {"type": "disabled"}}, {"enabled": False}),
        ({"thinking": {"type": "adaptive"}}, {}),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, {"exclude": True}),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, {}),
        ({"output_config": {"effort": "low"}}, {"effort": "low"}),
        (
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}},
            {"effort": "max"},
        ),
        (
            {
                "thinking": {"type": "enabled", "budget_tokens": 9, "display": "omitted"},
                "output_config": {"effort": "low"},
            },
            {"max_tokens": 9, "exclude": True},
        ),
    ],
)
def test_thinking_is_asked_for_as_in_a_chat(fields: Any, expected: Any) -> None:
    assert reasoning(**fields) == expected


@pytest.mark.parametrize("thinking", ["disabled", "enabled"])
def test_an_effort_that_thinking_overrules_is_named(thinking: str) -> None:
    budget = {"budget_tokens": 9} if thinking == "enabled" else {}
    request = read(thinking={"type": thinking, **budget}, output_config={"effort": "low"})
    assert list(request.model_extra or {}) == ["output_config.effort"]


def test_a_schema_of_the_answer_is_a_response_format() -> None:
    form = read(output_config={"format": {"type": "json_schema", "schema": SCHEMA}}).response_format
    assert form is not None
    assert form.json_schema is not None
    assert (form.json_schema.schema_, form.json_schema.strict) == (SCHEMA, True)


def test_words_with_another_name_in_a_chat_are_translated() -> None:
    request = read(
        stop_sequences=["a", "b"],
        metadata={"user_id": "u"},
        fallbacks=[{"model": "x"}, {"model": "y"}],
        service_tier="standard_only",
    )
    assert (request.stop, request.user, request.models) == (["a", "b"], "u", ["x", "y"])
    assert request.service_tier == "default"


def test_words_with_the_same_name_in_a_chat_pass() -> None:
    same: dict[str, Any] = {
        "model": "m",
        "models": ["x"],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.5,
        "top_k": 5,
        "stream": True,
        "service_tier": "auto",
        "session_id": "s",
        "preset": "p",
        "trace": {"trace_id": "t"},
        "user": "u",
        "seed": 1,
    }
    request = read(**same, metadata={"user_id": "other"})
    assert {name: getattr(request, name) for name in same} == same


def test_what_changes_nothing_keeps_its_name_and_hints_for_a_cache_are_not_told() -> None:
    hint = {"cache_control": {"type": "ephemeral"}}
    request = read(
        {"role": "user", "content": [{"type": "text", "text": "hi", **hint, "color": 1}]},
        tools=[{**TOOL, **hint, "defer_loading": True}],
        output_config={"task_budget": {}, "effort": None},
        context_management={"edits": []},
        speed="fast",
    )
    assert set(request.model_extra or {}) == {
        "context_management",
        "messages[].content[].color",
        "output_config.task_budget",
        "speed",
        "tools[].defer_loading",
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content: "),
        ({"messages": [{"role": "user", "content": [{"x": 1}]}]}, "messages.0.content.0.type: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text: ",
        ),
        (
            {"messages": [{"role": "user", "content": [{**RESULT, "content": [{"type": []}]}]}]},
            "messages.0.content.0.content.0.type: ",
        ),
        (
            {"messages": [{"role": "user", "content": [CALL]}]},
            "belongs into a message of role assi",
        ),
        ({"messages": [{"role": "assistant", "content": [RESULT]}]}, "of role user"),
        ({"system": [{"type": "image"}]}, "system.0.type: "),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "'web_search_20250305'"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema: "),
        ({"tool_choice": {"type": "tool"}}, "tool_choice: "),
        ({"thinking": {"type": "enabled"}}, "thinking: "),
        ({"thinking": {"type": "adaptive", "budget_tokens": 9}}, "thinking: "),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences: at most 4"),
        ({"fallbacks": [{"model": "x"}] * 4}, "fallbacks: "),
        ({"fallbacks": [{"model": "x", "max_tokens": 1}]}, "fallbacks.0.max_tokens: "),
        ({"fallbacks": [{"model": "x"}], "models": ["y"]}, "models: fallbacks says the same"),
        ({"stop_sequences": ["a"], "stop": ["b"]}, "stop: stop_sequences says the same"),
        ({"n": 2}, "n: "),
        ({"prompt": "x"}, "prompt: "),
        ({"logprobs": True}, "logprobs: "),
        ({"temperature": "hot"}, "temperature: "),
    ],
)
def test_a_mistake_is_told_by_the_names_of_this_dialect(fields: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        MESSAGES.read({"messages": [USER], **fields})

    assert words in str(caught.value)
    assert (caught.value.status, caught.value.error_type) == (400, "invalid_request")


def test_what_is_nested_too_deeply_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"a": deep}
    turn = {"role": "assistant", "content": [{**CALL, "input": deep}]}
    with pytest.raises(RequestError, match="nested too deeply"):
        MESSAGES.read({"messages": [USER, turn, USER]})
