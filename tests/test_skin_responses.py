"""/responses: its requests as those of a chat, its replies as items and numbered events."""

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.chat import Chat, ToolCall
from pipeline.engine.protocol import TokenLogprob
from pipeline.errors import Availability, RequestError
from pipeline.serve.asking.constraints import Constraints
from pipeline.serve.asking.ignored import find_ignored
from pipeline.serve.asking.request import ChatRequest, NamedTool
from pipeline.serve.offer.price import Cost
from pipeline.serve.replying.events import Called, Ended, Event, Said, Usage
from pipeline.serve.schema.responses import ResponseWriter
from pipeline.serve.skins.responses import Responses
from pipeline.serve.skins.skin import Bill, Heading

# OpenRouter's own, of its public specification.
SCHEMAS = json.loads((Path(__file__).parent / "openrouter_schemas.json").read_text("utf-8"))
SKIN = Responses()
USER = {"role": "user", "content": "hi"}
THOUGHT = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [{"type": "summary_text", "text": "not this"}],
    "content": [
        {"type": "reasoning_text", "text": "h"},
        {"type": "other", "text": "nor this"},
        {"type": "reasoning_text", "text": "m"},
    ],
    "format": "unknown",
}
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}],
}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}"}
ANSWERED = {"type": "function_call_output", "call_id": "c1", "output": "42"}
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
OTHER = {"type": "function", "name": "g", "description": "gs", "parameters": None, "strict": None}
BILL = Bill(Usage(10, 8, 3, 4), Cost(2_000_000, 3_000_000))
TURN: list[Event] = [
    Said("reasoning", "h"),
    Said("reasoning", "m"),
    Said("answer", "ye"),
    Said("answer", "s"),
    Called(0, ToolCall("f", '{"a": 1}')),
    Called(1, ToolCall("g", "{}")),
    Ended("tool_calls", "stop"),
]


def read(**values: Any) -> ChatRequest:
    return SKIN.read({"input": [USER], **values})


def messages(*items: Any) -> Any:
    return SKIN.read({"input": list(items)}).messages


def refusal(**values: Any) -> str:
    with pytest.raises(RequestError) as caught:
        read(**values)
    assert caught.value.status == 400
    return str(caught.value)


def heading(chat: Chat, **fields: Any) -> Heading:
    return Heading("gen-1-a", 1767225600, "me/tiny", "Pipeline", chat, **fields)


def streamed(
    heading: Heading, events: list[Event], error: RequestError | None = None, echo: Any = None
) -> list[Any]:
    """The events of a stream, each as an object."""
    writer = ResponseWriter(heading)
    frames = writer.begin(echo) + b"".join(writer.frames(0, event) for event in events)
    frames += writer.finish(BILL) if error is None else writer.fail(error, BILL)
    comment, *told, done, end = frames.decode().split("\n\n")
    assert (comment, done, end) == (":", "data: [DONE]", "")
    objects = []
    for frame in told:
        name, data = frame.split("\n")
        objects.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {objects[-1]['type']}"
    assert [told["sequence_number"] for told in objects] == list(range(len(objects)))
    return objects


def whole(heading: Heading, events: list[Event], error: RequestError | None = None) -> Any:
    writer = ResponseWriter(heading)
    for event in events:
        writer.add(0, event)
    return json.loads(json.dumps(writer.body(BILL, error)))


def check(body: Any, root: str = "responses") -> None:
    """Against OpenRouter's schema of that answer."""
    schema = {**SCHEMAS["roots"][root], "components": SCHEMAS["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)


def without_ids(value: Any) -> Any:
    """And without the time: both are new in every reply."""
    if isinstance(value, dict):
        named = ("id", "item_id", "call_id", "completed_at")
        return {key: without_ids(item) for key, item in value.items() if key not in named}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([USER], [USER]),
        ([{"type": "message", **USER, "content": []}], [{**USER, "content": ""}]),
        (
            [{"role": "developer", "content": [{"type": "input_text", "text": "a"}] * 2}],
            [{"role": "developer", "content": "aa"}],
        ),
        (
            [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
            [USER, {"role": "assistant", "content": "no"}],
        ),
        (
            [USER, THOUGHT, SAID, CALL, {**CALL, "call_id": "c2"}, ANSWERED, THOUGHT, SAID],
            [
                USER,
                {
                    "role": "assistant",
                    "content": "yes",
                    "reasoning": "hm",
                    "tool_calls": [
                        {
                            "id": name,
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                        for name in ("c1", "c2")
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "42"},
                {"role": "assistant", "content": "yes", "reasoning": "hm"},
            ],
        ),
        (
            [CALL, SAID, {**ANSWERED, "output": [{"type": "input_text", "text": "4"}]}],
            [
                {
                    "role": "assistant",
                    "content": "yes",
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "4"},
            ],
        ),
        (
            [SAID, SAID, THOUGHT, SAID],
            [
                {"role": "assistant", "content": "yes"},
                {"role": "assistant", "content": "yes"},
                {"role": "assistant", "content": "yes", "reasoning": "hm"},
            ],
        ),
        ([USER, THOUGHT], [USER]),
    ],
)
def test_items_of_one_reply_are_one_message(items: list[Any], expected: list[Any]) -> None:
    assert messages(*items) == expected


def test_a_text_is_a_users_message_and_instructions_are_the_systems() -> None:
    request = SKIN.read({"input": "hi", "instructions": "be brief"})

    assert request.messages == [{"role": "system", "content": "be brief"}, USER]


def test_what_is_no_text_is_left_for_the_chat_to_refuse() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "x"}]
    [message] = messages({"role": "user", "content": [*parts, {"type": "input_audio"}]})

    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image_url", "input_audio"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
parts = st.fixed_dictionaries({"type": st.just("reasoning_text"), "text": json_values})


@given(st.dictionaries(st.sampled_from(["id", "summary", "content"]), json_values), parts)
def test_no_reasoning_item_is_too_odd(item: dict[str, Any], part: dict[str, Any]) -> None:
    for odd in (item, {**item, "content": [part, THOUGHT["content"][0]]}):
        assert messages(USER, {**odd, "type": "reasoning"}, SAID)[0] == USER


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input": None}, 'Input required: specify "input"'),
        ({"input": []}, 'Input required: specify "input"'),
        ({"input": [THOUGHT]}, 'Input required: specify "input"'),
        ({"input": 5}, "input: must be a text or a list of items"),
        ({"input": [USER, 5]}, "input.1: must be an object"),
        ({"input": [{"role": "user"}]}, "input.0.content: Field required"),
        (
            {"input": [USER, {"role": "user", "content": 5}]},
            "input.1.content: must be a text or a list of parts",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]},
            "input.0.content.0.text: Input should be a valid string",
        ),
        (
            {"input": [{**CALL, "arguments": {}}]},
            "input.0.arguments: Input should be a valid string",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type: 'item_reference' is"),
        ({"store": True}, "store: nothing is stored here"),
        ({"background": True}, "background: a response is not kept"),
        ({"previous_response_id": "resp_1"}, "previous_response_id: nothing is stored here"),
        ({"conversation": "conv_1"}, "conversation: nothing is stored here"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt: nothing is stored here"),
        ({"messages": [USER]}, "messages: they are the input"),
        ({"n": 2}, "n: a response is one reply"),
        ({"max_output_tokens": 0}, "max_output_tokens: Input should be greater than or equal to 1"),
        ({"tools": [FUNCTION, {"type": "web_search"}]}, "tools.1.type: 'web_search' is not avail"),
        ({"tools": [{"type": "function"}]}, "tools.0.name: Field required"),
        ({"tool_choice": "maybe"}, "tool_choice: must be auto, none, required"),
        ({"tool_choice": {"type": "shell"}}, "tool_choice.type: 'shell' is not available"),
        (
            {
                "tools": [FUNCTION],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "h"}],
                },
            },
            "tool_choice.tools: there is no tool 'h' in tools",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "a"}}},
            "text.format: type json_schema needs the fields name and schema",
        ),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type: Input should be 'text', "),
        ({"truncation": "middle"}, "truncation: Input should be 'auto' or 'disabled'"),
        ({"top_logprobs": 21}, "top_logprobs: Input should be less than or equal to 20"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort: Input should be "),
    ],
)
def test_what_is_wrong_is_named_as_the_client_wrote_it(
    values: dict[str, Any], message: str
) -> None:
    assert refusal(**values).startswith(message)


def test_what_the_response_could_not_repeat_is_refused() -> None:
    deep: Any = {}
    for _ in range(300):
        deep = {"items": deep}

    assert refusal(tools=[{**FUNCTION, "parameters": deep}]) == "the body is nested too deeply"


of_request = ["input", "tools", "tool_choice", "text", "reasoning", "include", "metadata", "user"]
of_parts = ["type", "role", "content", "name", "call_id", "output", "arguments", "format", "mode"]
words = ["user", "assistant", "message", "function", "function_call", "allowed_tools", "auto"]
fields = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(words),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(of_parts), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(of_request), fields))
def test_a_body_is_refused_or_can_be_repeated(chat: Chat, body: dict[str, Any]) -> None:
    try:
        SKIN.read({"input": "hi", **body})
    except RequestError:
        return
    check(whole(heading(chat, values=body), TURN))


def test_null_and_the_values_of_a_server_without_memory_are_the_same_as_nothing() -> None:
    nothing = {
        "store": False,
        "background": False,
        "previous_response_id": None,
        "max_output_tokens": None,
        "reasoning": None,
        "text": None,
        "tools": None,
        "tool_choice": None,
        "include": [],
        "top_logprobs": 0,
        "n": 1,
    }

    assert read(**nothing).model_dump(exclude_none=True) == read().model_dump(exclude_none=True)


def test_tools_and_choices_are_those_of_a_chat() -> None:
    function = {"name": "f", "parameters": {"type": "object"}, "strict": True}
    both = [
        {"type": "function", "function": function},
        {"type": "function", "function": {"name": "g", "description": "gs"}},
    ]
    named = {"type": "function", "name": "g"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [named]}

    assert read(tools=[FUNCTION, OTHER]).tools == both
    for word in ("auto", "none", "required"):
        assert read(tools=[FUNCTION], tool_choice=word).tool_choice == word
    choice = read(tools=[FUNCTION, OTHER], tool_choice=named).tool_choice
    assert isinstance(choice, NamedTool)
    assert choice.function.name == "g"
    restricted = read(tools=[FUNCTION, OTHER], tool_choice=allowed)
    assert (restricted.tools, restricted.tool_choice) == ([both[1]], "required")


def test_a_form_is_that_of_a_chat() -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": None}
    wanted = read(text={"format": form, "verbosity": "low"})

    assert wanted.response_format is not None
    assert wanted.response_format.model_dump(by_alias=True, exclude_unset=True) == {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"type": "object"}},
    }
    assert wanted.verbosity == "low"
    plain = read(text={"format": {"type": "json_object"}}).response_format
    assert plain is not None
    assert plain.type == "json_object"


@pytest.mark.parametrize(
    ("values", "logprobs"),
    [
        ({}, (None, None)),
        ({"top_logprobs": 0}, (None, None)),
        ({"top_logprobs": 2}, (True, 2)),
        ({"include": ["message.output_text.logprobs"]}, (True, None)),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 0}, (True, 0)),
    ],
)
def test_logprobs_are_asked_for_by_number_or_by_name(
    values: dict[str, Any], logprobs: tuple[Any, Any]
) -> None:
    request = read(**values)

    assert (request.logprobs, request.top_logprobs) == logprobs
    assert request.model_extra == {}


def test_what_has_the_same_name_passes_and_what_changes_nothing_is_named() -> None:
    request = read(
        temperature=0.5,
        max_output_tokens=9,
        truncation="auto",
        reasoning={"effort": "low", "summary": "auto"},
        models=["a"],
        metadata={"a": "b"},
        stream=True,
        include=["reasoning.encrypted_content", "message.output_text.logprobs"],
        max_tool_calls=3,
    )

    assert (request.temperature, request.max_completion_tokens, request.stream) == (0.5, 9, True)
    assert (request.transforms, request.models) == (["middle-out"], ["a"])
    assert read(truncation="disabled").transforms == []
    assert request.metadata == {"a": "b"}
    ignored = find_ignored(request, frozenset(["logprobs"]), Constraints())
    assert sorted(ignored) == ["include", "max_tool_calls", "reasoning.summary"]


def test_a_stream_is_numbered_events_of_one_item_after_another(chat: Chat) -> None:
    told = streamed(heading(chat), TURN)

    assert [event["type"].removeprefix("response.") for event in told] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        *(
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
        )
        * 2,
        "completed",
    ]
    check(told[-1]["response"])
    for event in told[:2]:
        begun = event["response"]
        # The schema has no null here, and OpenRouter's own streams have.
        assert (begun["status"], begun["output"], begun.pop("usage")) == ("in_progress", [], None)
        check(begun)
    added, part, delta = told[9:12]
    assert without_ids(added["item"]) == {
        "type": "message",
        "role": "assistant",
        "status": "in_progress",
        "content": [],
    }
    assert part["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert without_ids(delta) == {
        "type": "response.output_text.delta",
        "sequence_number": 11,
        "output_index": 1,
        "content_index": 0,
        "delta": "ye",
        "logprobs": [],
    }
    assert delta["item_id"] == added["item"]["id"]
    assert without_ids(told[16]["item"]) == {
        "type": "function_call",
        "name": "f",
        "arguments": "",
        "status": "in_progress",
    }
    assert (told[18]["name"], told[18]["arguments"]) == ("f", '{"a": 1}')


def test_a_whole_response_has_every_key(chat: Chat) -> None:
    body = whole(heading(chat), TURN)

    check(body)
    thought, said, first, second = body["output"]
    assert without_ids(thought) == {
        "type": "reasoning",
        "status": "completed",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "hm"}],
        "format": "unknown",
    }
    text = {"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}
    assert (said["content"], body["output_text"]) == ([text], "yes")
    assert (first["name"], first["arguments"]) == ("f", '{"a": 1}')
    assert len({item["id"] for item in body["output"]} | {first["call_id"]}) == 5
    assert first["call_id"] != second["call_id"]
    assert (body["id"], body["object"], body["status"]) == ("gen-1-a", "response", "completed")
    assert body["created_at"] <= body["completed_at"] <= time.time()
    assert body["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 8,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 18,
        "cost": 5e-06,
        "cost_details": {
            "upstream_inference_cost": 5e-06,
            "upstream_inference_input_cost": 2e-06,
            "upstream_inference_output_cost": 3e-06,
        },
        "is_byok": False,
    }
    echoed = {
        "instructions": None,
        "metadata": None,
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": None, "summary": None},
        "truncation": "disabled",
        "max_output_tokens": None,
        "store": False,
        "background": False,
        "error": None,
        "incomplete_details": None,
    }
    assert {name: body[name] for name in echoed} == echoed


def test_a_response_repeats_its_request(chat: Chat) -> None:
    asked = {
        "instructions": "be brief",
        "metadata": {"a": "b"},
        "temperature": 0,
        "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "name": "f"},
        "truncation": "auto",
        "max_output_tokens": 9,
        "top_logprobs": 2,
    }
    others = {
        "tools": [{"type": "function", "name": "f"}],
        "text": {"format": None, "verbosity": "low"},
        "reasoning": {"effort": "low", "summary": "auto"},
    }
    body = whole(heading(chat, values={**asked, **others, "top_p": None}), TURN)

    check(body)
    assert {name: body[name] for name in asked} == asked
    assert body["tools"] == [{"type": "function", "name": "f", "parameters": None, "strict": None}]
    assert body["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert body["reasoning"] == {"effort": "low", "summary": None}


bits = st.builds(Said, st.sampled_from(["reasoning", "answer"]), st.text(max_size=3))
calls = st.builds(ToolCall, st.text(min_size=1, max_size=3), st.just('{"a": "é"}'))
turns = st.lists(bits | st.builds(Called, st.just(0), calls), max_size=8)
ends = st.sampled_from([Ended("stop", "stop"), Ended("length", "length")])


@given(turns, ends | st.none())
def test_what_is_streamed_adds_up_to_what_is_whole(
    chat: Chat, turn: list[Event], end: Ended | None
) -> None:
    error = RequestError("gone", 502, "provider_unavailable") if end is None else None
    events = [*turn, *([end] if end else [])]
    told = streamed(heading(chat), events, error)
    body = whole(heading(chat), events, error)

    last = told[-1]
    assert last["type"] == f"response.{body['status']}"
    check(last["response"])
    assert without_ids(last["response"]) == without_ids(body)
    output = last["response"]["output"]
    said = [bit for bit in turn if isinstance(bit, Said)]
    texts = [
        "".join(bit.text for bit in said if bit.channel == channel)
        for channel in ("reasoning", "answer")
    ]
    assert [_texts(output, "reasoning"), _texts(output, "message")] == texts
    assert body["output_text"] == texts[1]
    deltas: dict[int, str] = {}
    for event in told:
        if event["type"].endswith(".delta"):
            index = event["output_index"]
            deltas[index] = deltas.get(index, "") + event["delta"]
            assert event["item_id"] == output[index]["id"]
    assert list(deltas) == list(range(len(output)))
    for item, delta in zip(output, deltas.values(), strict=True):
        content = item.get("content", [{"text": item.get("arguments")}])
        assert content[0]["text"] == delta
    over = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert over == (output if end else output[: len(over)])


def _texts(output: list[Any], kind: str) -> str:
    items = [item for item in output if item["type"] == kind]
    return "".join(part["text"] for item in items for part in item["content"])


def test_a_reply_that_is_cut_off_is_incomplete(chat: Chat) -> None:
    events: list[Event] = [Said("answer", "a"), Ended("length", "length")]
    body = whole(heading(chat), events)

    check(body)
    assert (body["status"], body["completed_at"]) == ("incomplete", None)
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["status"] == "incomplete"
    assert streamed(heading(chat), events)[-1]["type"] == "response.incomplete"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("gone", 502, "provider_unavailable"), "failed", "server_error"),
        (RequestError("slow", 429, "rate_limit_exceeded"), "failed", "rate_limit_exceeded"),
        (RequestError("odd", 400, "invalid_request"), "failed", "invalid_prompt"),
        (RequestError("long", 400, "context_length_exceeded"), "incomplete", None),
    ],
)
def test_a_reply_that_broke_keeps_what_there_was(
    chat: Chat, error: RequestError, status: str, code: str | None
) -> None:
    body = whole(heading(chat), [Said("answer", "a")], error)

    check(body)
    assert (body["status"], body["output_text"]) == (status, "a")
    assert body["output"][0]["status"] == "incomplete"
    assert body["error"] == (code and {"code": code, "message": str(error)})
    assert body.get("error_type") == (code and error.error_type)
    assert streamed(heading(chat), [Said("answer", "a")], error)[-1]["type"] == f"response.{status}"


def test_logprobs_stand_at_the_bits_and_at_the_whole_text(chat: Chat) -> None:
    ids = chat.text_ids("ab")
    tokens = [TokenLogprob(id, -0.5, ((id, -0.5), (ids[0], -1.5))) for id in ids]
    events: list[Event] = [Said("answer", "a", (tokens[0],)), Said("answer", "b", (tokens[1],))]
    told = streamed(heading(chat, has_logprobs=True), [*events, Ended("stop", "stop")])

    check(told[-1]["response"])
    deltas = [event["logprobs"] for event in told if event["type"].endswith("text.delta")]
    assert [[token["token"] for token in delta] for delta in deltas] == [["a"], ["b"]]
    assert deltas[0][0]["top_logprobs"][1] == {"token": "a", "logprob": -1.5, "bytes": [97]}
    part = told[-1]["response"]["output"][0]["content"][0]
    assert part["logprobs"] == [*deltas[0], *deltas[1]]
    done = [event for event in told if event["type"].endswith("text.done")]
    assert done[0]["logprobs"] == part["logprobs"]


def test_a_bit_without_anything_begins_no_item(chat: Chat) -> None:
    events: list[Event] = [Said("reasoning", ""), Said("answer", ""), Ended("stop", "stop")]

    assert whole(heading(chat), events)["output"] == []
    assert len(streamed(heading(chat), events)) == 3


def test_of_more_choices_than_one_the_first_is_told(chat: Chat) -> None:
    writer = ResponseWriter(heading(chat, num_choices=2))

    told = [writer.frames(index, Said("answer", "a")) for index in (0, 1)]
    assert (bool(told[0]), told[1]) == (True, b"")
    assert writer.body(BILL, None)["output_text"] == "a"


def test_an_echo_comes_first_and_metadata_last(chat: Chat) -> None:
    told = streamed(heading(chat), TURN, echo={"prompt": [1]})
    bill = Bill(Usage(), metadata={"requested": "a"})

    assert told[0]["debug"] == {"echo_upstream_body": {"prompt": [1]}}
    assert told[1]["type"] == "response.created"
    body = ResponseWriter(heading(chat)).body(bill, None)
    assert body["openrouter_metadata"] == {"requested": "a"}
    assert "openrouter_metadata" not in told[-1]["response"]


def test_a_failure_tells_its_type_inside_and_outside() -> None:
    gone = RequestError("a is gone", 404, "not_found", availability=Availability("no_endpoints"))
    body = SKIN.error_body(gone, ["a"], {"requested": "a"})

    check(body, "error_404")
    assert (body["error"]["code"], body["error_type"]) == (404, "not_found")
    assert body["error"]["metadata"] == {"error_type": "not_found"}
    assert body["error"]["availability"]["requested_models"] == ["a"]
    assert body["openrouter_metadata"] == {"requested": "a"}
    assert "openrouter_metadata" not in SKIN.error_body(gone, [])
