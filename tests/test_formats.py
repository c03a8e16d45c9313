"""Formats: each is detected by its keys, says what it says, and is refused in one sentence."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.conversation import Conversation, Document, Pair, Record, Sample, source_of
from pipeline.data.formats import detect, parse
from pipeline.errors import DataError
from pipeline.recipe import Format

FORMATS = get_args(Format)
PATH = Path("chats.jsonl")
USER = {"role": "user", "content": "How much is 1+1?"}
DIRECT = {"role": "assistant", "content": "2"}
OTHER = {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "Be brief."}
SCHEMA = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
HUMAN = {"from": "human", "value": "How much is 1+1?"}
GPT = {"from": "gpt", "value": "2"}
FINE: dict[Format, dict[str, Any]] = {
    "messages": {"messages": [USER, DIRECT]},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "alpaca": {"instruction": "How much is 1+1?", "output": "2"},
    "prompt_completion": {"prompt": "How much is 1+1?", "completion": "2"},
    "preference": {"prompt": "How much is 1+1?", "chosen": "2", "rejected": "3"},
    "text": {"text": "1+1 is 2."},
}


def record(value: Any) -> Record:
    return Record(value, PATH, 7)


def fault(value: Any, form: Format | None = None) -> str:
    """What is said after the place."""
    with pytest.raises(DataError) as caught:
        parse(record(value), form) if form else detect(record(value))
    said = str(caught.value)
    assert said.startswith("chats.jsonl:7: ")
    assert len(said) < 500
    assert len(said.splitlines()) == 1
    return said.removeprefix("chats.jsonl:7: ")


def messages_of(value: Any, form: Format) -> list[dict[str, Any]]:
    sample = parse(record(value), form)
    assert isinstance(sample, Conversation)
    return list(sample.messages)


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_is_detected_by_its_keys_and_a_sample_knows_its_place(form: Format) -> None:
    assert detect(record(FINE[form] | {"id": 3, "source": None})) == form
    assert source_of(parse(record(FINE[form]), form)) == "chats.jsonl:7"


def test_of_two_formats_the_richer_one_is_detected() -> None:
    order: list[Format] = [
        "messages", "sharegpt", "preference", "prompt_completion", "alpaca", "text",
    ]  # fmt: skip
    for index, form in enumerate(order):
        everything: dict[str, Any] = {}
        for later in order[index:]:
            everything |= FINE[later]
        assert detect(record(everything)) == form
        assert isinstance(parse(record(everything), "text"), Document)


def test_null_is_as_good_as_absent() -> None:
    value = {"messages": None, "conversations": None, "system": None, "tools": None}

    assert detect(record(value | FINE["alpaca"])) == "alpaca"
    expected = parse(record(FINE["alpaca"]), "alpaca")
    assert parse(record(value | FINE["alpaca"] | {"input": None, "history": None}), "alpaca") == (
        expected
    )


@pytest.mark.parametrize("value", [[], [FINE["messages"]], "text", 3, None, True])
def test_a_record_is_an_object(value: Any) -> None:
    said = 'a record must be a JSON object such as {"messages": [...]}'

    assert fault(value) == said
    assert fault(value, "messages") == said


def test_an_unknown_record_is_named_by_its_keys() -> None:
    known = (
        ", which is no known format: messages (messages); sharegpt (conversations); "
        "preference (chosen, rejected); prompt_completion (prompt, completion); "
        "alpaca (instruction, output); text (text); see data.sources[].format"
    )

    assert fault({"question": 1, "an\nswer": 2}) == f"it has the keys question, an swer{known}"
    assert fault({}) == f"it has no key with a value{known}"
    assert fault({"chosen": "x", "messages": None}) == f"it has the keys chosen{known}"
    assert fault({"data": [FINE["messages"]]}) == (
        f"it has the key data alone, around a list; let the file be that list{known}"
    )
    assert "…, which is no known format" in fault({"x" * 5_000_000: 1})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_a_record_of_another_format_is_called_by_its_name(form: Format, other: Format) -> None:
    if form != other:
        assert fault(FINE[other], form) == (
            f"this is {other}, but the source is read as {form}; name two sources"
        )


def test_a_record_without_the_formats_keys_is_told_which() -> None:
    assert fault({"instruction": "x"}, "alpaca") == (
        "it has the keys instruction; alpaca needs output"
    )
    assert fault({"a": 1, "b": 2}, "preference") == (
        "it has the keys a, b; preference needs chosen and rejected"
    )


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def calling(call: Any) -> dict[str, Any]:
    return chat(USER, DIRECT | {"tool_calls": [call]})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"messages": {}}, "messages must be a list with at least one item"),
        (chat(), "messages must be a list with at least one item"),
        ({"messages": "hello"}, "messages is text, and not JSON: Expecting value at character 1;"),
        ({"messages": "{}"}, "messages must be a list with at least one item"),
        ({"messages": '["\\ud83d"]'}, "messages is text, and \\ud83d is half a character; a text"),
        (chat("hi", DIRECT), "message 0 is not a JSON object"),
        (chat(USER, {"role": "bot", "content": "2"}), "message 1: role 'bot' is none of system,"),
        (chat(USER, DIRECT | {"role": "x\n" * 999_999}), "message 1: role 'x\\nx\\n"),
        (chat({"content": "x"}, DIRECT), "message 0: role None is none of"),
        (chat({"role": [], "content": "x"}, DIRECT), "message 0: role [] is none of"),
        (chat(USER), "there is no assistant turn to learn from"),
        (chat(USER, DIRECT | {"train": False}), "there is no assistant turn to learn from"),
        (chat(USER, DIRECT | {"weight": 0}), "there is no assistant turn to learn from"),
        (chat(USER, DIRECT | {"train": "false"}), "message 1: train must be true or false"),
        (chat(USER, DIRECT | {"train": 0}), "message 1: train must be true or false"),
        (chat(USER | {"train": True}, DIRECT), "message 0: only assistant turns can be trained"),
        (chat(USER, DIRECT | {"weight": 0.5}), "message 1: weight must be 0 or 1"),
        (chat(USER, DIRECT | {"weight": []}), "message 1: weight must be 0 or 1"),
        (chat(USER, {"role": "assistant"}), "message 1: an assistant turn with neither text nor"),
        (chat(USER, DIRECT | {"content": " \n"}), "message 1: an assistant turn with neither"),
        (chat(USER, DIRECT | {"content": "<think>Hm"}), "message 1: its <think> is never closed"),
        (chat(USER | {"content": 3}, DIRECT), "message 0: content must be text, not int"),
        (
            chat({"role": "user", "content": [{"type": "image_url"}]}, DIRECT),
            "message 0: content part 'image_url' is not text",
        ),
        (chat({"role": "user", "content": ["x"]}, DIRECT), "message 0: content part 'str' is not"),
        (
            chat(USER, DIRECT | {"tool_calls": {}, "content": ""}),
            "message 1: an assistant turn with neither",
        ),
        (chat(USER, DIRECT | {"tool_calls": "f"}), "message 1: tool_calls must be a list"),
        (calling(3), "message 1: a tool call has no function name"),
        (calling({"function": {"arguments": "{}"}}), "message 1: a tool call has no function name"),
        (
            chat(USER, DIRECT | {"function_call": "f"}),
            "message 1: a tool call has no function name",
        ),
        *(
            (
                calling({"function": {"name": "f", "arguments": bad}}),
                "message 1: a tool call's arguments are not a JSON object",
            )
            for bad in ('{"a": 1', "[1]", [1], '{"a": NaN}', '{"a": "\\ud83d"}', "[" * 100_000)
        ),
        (chat(USER, DIRECT, tools=["f"]), "tools must be a list of JSON objects"),
        (chat(USER, DIRECT, tools="[{"), "tools must be a list of JSON objects"),
        (chat(USER, DIRECT, tools={"a": 1}), "tools must be a list of JSON objects"),
        (chat(USER, DIRECT, functions=3), "tools must be a list of JSON objects"),
    ],
)
def test_faulty_messages_are_named(value: Any, said: str) -> None:
    assert fault(value, "messages").startswith(said)


def test_messages_and_tools_are_as_the_record_has_them() -> None:
    messages = [
        SYSTEM,
        USER | {"name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "train": False},
        {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "a"},
        DIRECT | {"reasoning_content": "One and one.", "weight": 1},
    ]

    for value in (
        chat(*messages, tools=[TOOL], parallel_tool_calls=True),
        {"messages": json.dumps(messages), "tools": json.dumps([TOOL])},
    ):
        assert parse(record(value), "messages") == Conversation(tuple(messages), (TOOL,), PATH, 7)
    for nothing in ({}, [], "", None):
        assert parse(record(chat(USER, DIRECT, tools=nothing)), "messages") == (
            Conversation((USER, DIRECT), (), PATH, 7)
        )


def test_openais_older_names_for_tools_mean_todays() -> None:
    call = {"name": "f", "arguments": '{"a": null}'}
    asked = {"role": "assistant", "content": None, "function_call": call}
    result = {"role": "function", "name": "f", "content": "2"}

    sample = parse(record(chat(USER, asked, result, DIRECT, functions=[SCHEMA])), "messages")

    assert isinstance(sample, Conversation)
    assert sample.tools == (TOOL,)
    assert sample.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert sample.messages[2] == {"role": "tool", "name": "f", "content": "2"}
    both = asked | {"tool_calls": [CALL]}
    assert messages_of(chat(USER, both), "messages") == [USER, both]


def test_a_bare_schema_is_put_into_a_tool_as_clients_send_it() -> None:
    tools = [SCHEMA, SCHEMA | {"type": "function"}, TOOL, {"type": "web_search"}]

    sample = parse(record({"conversations": [HUMAN, GPT], "tools": json.dumps(tools)}), "sharegpt")

    assert isinstance(sample, Conversation)
    assert sample.tools == (TOOL, TOOL, TOOL, {"type": "web_search"})


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("human", "user"), "user"),
        (("gpt", "assistant", "chatgpt", "model"), "assistant"),
        (("system",), "system"),
        (("tool", "observation", "function_response"), "tool"),
    ],
)
def test_sharegpt_knows_roles_by_many_names(names: tuple[str, ...], role: str) -> None:
    for name in names:
        for item in ({"from": name, "value": "x"}, {"role": name, "content": "x"}):
            messages = messages_of({"conversations": [item, HUMAN, GPT]}, "sharegpt")
            assert messages == [{"role": role, "content": "x"}, USER, DIRECT]


def test_sharegpt_keeps_what_else_an_item_says() -> None:
    first = GPT | {"train": False}
    last = GPT | {"weight": 1, "reasoning": "One and one."}

    messages = messages_of({"conversations": [HUMAN, first, HUMAN, last]}, "sharegpt")

    assert messages[1] == DIRECT | {"train": False}
    assert messages[3] == DIRECT | {"weight": 1, "reasoning": "One and one."}


def test_sharegpts_calls_join_the_turn_they_belong_to() -> None:
    function = {"name": "f", "arguments": {"a": None}}
    single = {"from": "function_call", "value": json.dumps(function)}
    several = {"from": "function_call", "value": json.dumps([function, CALL])}
    result = {"from": "observation", "value": "2"}

    messages = messages_of(
        {"conversations": [HUMAN, single, several, result, GPT, single, result, GPT]}, "sharegpt"
    )

    assert messages == [
        USER,
        {"role": "assistant", "tool_calls": [CALL, CALL, CALL]},
        {"role": "tool", "content": "2"},
        DIRECT | {"tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        DIRECT,
    ]


def test_sharegpts_system_stands_first() -> None:
    value = {"conversations": [HUMAN, GPT], "system": "Be brief."}
    item = {"from": "system", "value": "Be brief."}

    assert messages_of(value, "sharegpt") == [SYSTEM, USER, DIRECT]
    assert messages_of(value | {"system": " "}, "sharegpt") == [USER, DIRECT]
    both = value | {"conversations": [item, HUMAN, GPT]}
    assert messages_of(both, "sharegpt") == [SYSTEM, USER, DIRECT]
    assert fault(both | {"system": "Be long."}, "sharegpt") == (
        "system stands twice, beside conversations and in it; keep one"
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"conversations": 3}, "conversations must be a list with at least one item"),
        ({"conversations": []}, "conversations must be a list with at least one item"),
        ({"conversations": ["hi"]}, "conversations 0 is not a JSON object"),
        ({"conversations": [HUMAN, {"value": "x"}]}, "conversations 1: from None is none of human"),
        ({"conversations": [HUMAN | {"from": {}}]}, "conversations 0: from {} is none of human, "),
        ({"conversations": [HUMAN | {"from": "alien"}]}, "conversations 0: from 'alien' is none"),
        ({"conversations": [HUMAN]}, "there is no assistant turn to learn from"),
        ({"conversations": [HUMAN, GPT | {"value": 2}]}, "message 1: content must be text, not"),
        ({"conversations": [HUMAN, GPT | {"value": ""}]}, "message 1: an assistant turn with"),
        ({"conversations": [HUMAN, GPT], "system": {}}, "system must be text, not dict"),
        ({"conversations": [HUMAN, GPT], "tools": "f"}, "tools must be a list of JSON objects"),
        *(
            ({"conversations": [HUMAN, {"from": "function_call", "value": bad}]}, said)
            for bad, said in (
                ("f()", "conversations 1: a function_call is not JSON: Expecting value"),
                ("[]", "conversations 1: a function_call must be a call or a list of calls"),
                ("3", "message 1: a tool call has no function name"),
                (None, "message 1: a tool call has no function name"),
                ({"name": "f", "arguments": 3}, "message 1: a tool call's arguments are not"),
            )
        ),
        (
            {
                "conversations": [
                    GPT | {"tool_calls": 5},
                    {"from": "function_call", "value": '{"name": "f"}'},
                ]
            },
            "conversations 1: a function_call must be a call or a list of calls",
        ),
    ],
)
def test_faulty_sharegpt_is_named(value: Any, said: str) -> None:
    assert fault(value, "sharegpt").startswith(said)


def test_alpaca_is_a_question_its_input_and_the_answer() -> None:
    value = {
        "instruction": "Translate.",
        "input": "Hund",
        "output": "dog",
        "system": "Be brief.",
        "history": [["Hi", "Hello"], ["Katze", "cat"]],
    }
    turns = [("Hi", "Hello"), ("Katze", "cat"), ("Translate.\nHund", "dog")]
    expected = [SYSTEM]
    for question, answer in turns:
        expected += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]

    assert messages_of(value, "alpaca") == expected
    in_csv = value | {"history": json.dumps(value["history"])}
    assert messages_of(in_csv, "alpaca") == expected
    blank = {"input": "", "system": " ", "history": ""}
    assert messages_of(FINE["alpaca"] | blank, "alpaca") == [USER, DIRECT]
    only_input = {"instruction": "", "input": USER["content"], "output": "2"}
    assert messages_of(only_input, "alpaca") == [USER, DIRECT]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"instruction": " "}, "instruction is blank"),
        ({"instruction": 3}, "instruction must be text, not int"),
        ({"input": []}, "input must be text, not list"),
        ({"output": ""}, "output is blank"),
        ({"output": {"a": 1}}, "output must be text, not dict"),
        ({"output": "<think>Hm"}, "message 1: its <think> is never closed"),
        ({"system": 3}, "system must be text, not int"),
        ({"history": "Hi"}, "history is text, and not JSON: Expecting value at character 1;"),
        ({"history": {"a": 1}}, "history must be a list with at least one item"),
        ({"history": [["a", "b"], "ab"]}, "history 1 must be a question and its answer, both"),
        ({"history": [["a"]]}, "history 0 must be a question and its answer, both text"),
        ({"history": [["a", None]]}, "history 0 must be a question and its answer, both text"),
        ({"history": [["a", ""]]}, "message 1: an assistant turn with neither text nor tool calls"),
    ],
)
def test_faulty_alpaca_is_named(more: dict[str, Any], said: str) -> None:
    assert fault(FINE["alpaca"] | more, "alpaca").startswith(said)


def test_of_a_prompt_and_its_completion_only_the_completion_is_learnt() -> None:
    prompt = [SYSTEM, USER, DIRECT, USER]
    value = {"prompt": prompt, "completion": [DIRECT, USER, OTHER], "tools": [TOOL]}
    context = [SYSTEM, USER, DIRECT | {"train": False}, USER]

    assert messages_of(FINE["prompt_completion"], "prompt_completion") == [USER, DIRECT]
    assert parse(record(value), "prompt_completion") == Conversation(
        (*context, DIRECT, USER, OTHER), (TOOL,), PATH, 7
    )
    assert messages_of({"prompt": prompt, "completion": "2"}, "prompt_completion") == [
        *context,
        DIRECT,
    ]
    in_csv = {"prompt": json.dumps(prompt), "completion": json.dumps([DIRECT])}
    assert messages_of(in_csv, "prompt_completion") == [*context, DIRECT]


@pytest.mark.parametrize("text", ["[1, 2]", "[", "[]", '[{"a": 1}]', '["role"]', "[{}"])
def test_text_that_only_looks_like_messages_stays_text(text: str) -> None:
    value = {"prompt": text, "completion": text}

    assert messages_of(value, "prompt_completion") == [
        {"role": "user", "content": text},
        {"role": "assistant", "content": text},
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompt": ""}, "prompt is blank"),
        ({"prompt": 3}, "prompt must be text, not int"),
        ({"completion": " \n"}, "completion is blank"),
        ({"completion": {"role": "assistant"}}, "completion must be text, not dict"),
        ({"completion": []}, "completion must be a list with at least one item"),
        ({"completion": ["x"]}, "completion: message 0 is not a JSON object"),
        ({"completion": "<think>x"}, "completion: message 0: its <think> is never closed"),
        ({"completion": [USER]}, "completion must go on with an assistant turn after the prompt"),
        ({"prompt": [USER, DIRECT]}, "the prompt before completion must end with a user or tool"),
        ({"prompt": [SYSTEM]}, "the prompt before completion must end with a user or tool turn"),
        ({"prompt": [USER, 3]}, "prompt: message 1 is not a JSON object"),
        ({"prompt": '[{"role": "bot"}]'}, "prompt: message 0: role 'bot' is none of system"),
        ({"completion": [DIRECT | {"train": False}]}, "there is no assistant turn to learn from"),
    ],
)
def test_faulty_prompts_and_completions_are_named(more: dict[str, Any], said: str) -> None:
    assert fault(FINE["prompt_completion"] | more, "prompt_completion").startswith(said)


def test_a_pair_continues_its_prompt_in_two_ways() -> None:
    expected = Pair((USER,), (), (DIRECT,), (OTHER,), PATH, 7)

    for value in (
        FINE["preference"],
        {"prompt": [USER], "chosen": [DIRECT], "rejected": [OTHER]},
        {"prompt": "How much is 1+1?", "chosen": [DIRECT], "rejected": "3"},
        {"chosen": [USER, DIRECT], "rejected": [USER, OTHER]},
        {"prompt": "How much is 1+1?", "chosen": [USER, DIRECT], "rejected": [USER, OTHER]},
        {"chosen": json.dumps([USER, DIRECT]), "rejected": json.dumps([USER, OTHER])},
    ):
        assert parse(record(value), "preference") == expected


def test_whole_conversations_part_where_they_first_differ() -> None:
    common = [SYSTEM, USER, DIRECT, USER]
    value = {
        "chosen": [*common, DIRECT, USER, DIRECT],
        "rejected": [*common, OTHER, USER, DIRECT],
        "tools": [TOOL],
    }

    assert parse(record(value), "preference") == Pair(
        tuple(common), (TOOL,), (DIRECT, USER, DIRECT), (OTHER, USER, DIRECT), PATH, 7
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rejected": "2"}, "chosen and rejected are the same"),
        ({"chosen": ""}, "chosen is blank"),
        ({"rejected": 3}, "rejected must be text, not int"),
        ({"chosen": []}, "chosen must be a list with at least one item"),
        ({"rejected": [{"role": "bot"}]}, "rejected: message 0: role 'bot' is none of"),
        ({"prompt": None}, "preference needs prompt where chosen and rejected are answers alone"),
        ({"prompt": ""}, "prompt is blank"),
        ({"prompt": [USER, DIRECT]}, "the prompt before chosen must end with a user or tool turn"),
        ({"chosen": [USER, DIRECT]}, "the prompt before chosen must end with a user or tool turn"),
        (
            {"chosen": [USER, DIRECT], "rejected": [USER]},
            "rejected must go on with an assistant turn after the prompt",
        ),
        (
            {"chosen": [USER], "rejected": [USER, DIRECT]},
            "chosen must go on with an assistant turn after the prompt",
        ),
        (
            {"chosen": [USER, DIRECT], "rejected": [SYSTEM, USER, DIRECT]},
            "the prompt before chosen must end with a user or tool turn",
        ),
        (
            {"chosen": [USER, DIRECT, USER, DIRECT], "rejected": [USER, DIRECT]},
            "the prompt before chosen must end with a user or tool turn",
        ),
        (
            {"chosen": [SYSTEM, USER, USER, DIRECT], "rejected": [SYSTEM, USER, OTHER]},
            "chosen must go on with an assistant turn after the prompt",
        ),
    ],
)
def test_faulty_pairs_are_named(more: dict[str, Any], said: str) -> None:
    assert fault(FINE["preference"] | more, "preference").startswith(said)


def test_text_is_a_document_as_it_stands() -> None:
    assert parse(record({"text": " a\r\nb "}), "text") == Document(" a\r\nb ", PATH, 7)
    assert fault({"text": " \n"}, "text") == "text is blank"
    assert fault({"text": ["a"]}, "text") == "text must be text, not list"


KEYS = sorted({key for value in FINE.values() for key in value} | {"input", "history", "system"})
ITEM_KEYS = [
    *("role", "content", "from", "value", "train", "weight", "tool_calls", "function_call"),
    *("function", "name", "arguments", "type", "text", "reasoning", "reasoning_details"),
]
known_words = st.sampled_from(
    [
        *("user", "assistant", "system", "tool", "human", "gpt", "function", "function_call"),
        *("developer", "text", "f", "{}", "[]", "[3]", "<think>"),
    ]
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 1), st.floats(), st.text(max_size=5), known_words
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(ITEM_KEYS), st.text(max_size=3)), inner),
    ),
    max_leaves=8,
)
# The same with what it takes to come further than the first check.
turns = st.dictionaries(st.sampled_from(ITEM_KEYS), values, max_size=4).flatmap(
    lambda more: st.builds(
        lambda role, content: {"role": role, "content": content} | more, known_words, scalars
    )
)
fields = st.one_of(values, st.lists(turns, max_size=4), st.lists(turns).map(json.dumps))
records = st.one_of(
    values,
    st.dictionaries(st.sampled_from([*KEYS, "tools", "functions"]), fields),
    st.sampled_from(list(FINE.values())).flatmap(
        lambda fine: st.dictionaries(st.sampled_from([*KEYS, "tools"]), fields, max_size=3).map(
            lambda more: fine | more
        )
    ),
)


def sentence_of(value: Any, form: Format | None) -> str | None:
    try:
        sample = parse(record(value), form or detect(record(value)))
    except DataError as error:
        return str(error)
    assert isinstance(sample, Sample)
    return None


@settings(max_examples=60, deadline=None)
@given(records, st.sampled_from([None, *FORMATS]))
@example({"messages": [USER, DIRECT | {"tool_calls": [{"function": {"name": "f"}}]}]}, "messages")
@example({"chosen": {"\n" * 999: 1}, "rejected": 3}, "preference")
def test_any_value_is_a_sample_or_one_sentence_at_its_place(
    value: Any, form: Format | None
) -> None:
    said = sentence_of(value, form)

    if said is not None:
        assert said.startswith("chats.jsonl:7: ")
        assert len(said) < 500
        assert len(said.splitlines()) == 1


def nested() -> Any:
    value: Any = "x"
    for _ in range(100_000):
        value = [value]
    return value


def test_values_nested_too_deeply_are_a_sentence() -> None:
    deep = nested()

    for form, value in FINE.items():
        for key in value:
            assert fault(value | {key: deep}, form)
    pair = {"chosen": [USER | {"x": deep}, DIRECT], "rejected": [USER | {"x": nested()}, OTHER]}
    assert fault(pair, "preference") == "it is nested too deeply"


@pytest.mark.parametrize("arguments", ["null", "[]", "0", "false", '""', [], 0, False, "{"])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]

    with pytest.raises(DataError, match="a tool call's arguments are not a JSON object"):
        parse(Record({"messages": messages}, Path("a.jsonl"), 1), "messages")


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_arguments_may_be_left_out(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]

    assert parse(Record({"messages": messages}, Path("a.jsonl"), 1), "messages")
