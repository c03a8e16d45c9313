"""Chat renders and encodes what transformers does: the official template, the official ids."""

import hashlib
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import pipeline.base
from pipeline.base.dialogue import BLOCK_TOKENS, CONTROL_TOKENS
from pipeline.base.qwen3 import qwen3_dialogue
from pipeline.chat import Chat, Message, Mode
from pipeline.errors import BaseError, DataError

VENDORED = Path(pipeline.base.__file__).with_name("qwen3.jinja")
LITERALS = (*CONTROL_TOKENS, *BLOCK_TOKENS)
MODES: tuple[Mode, ...] = ("thinking", "direct")
ASK: list[Message] = [{"role": "user", "content": "How much is 1+1?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für einen Ort — 天気",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}

# Hypothesis picks constants out of the sources, so control tokens would come up.
texts = st.text(max_size=12).filter(
    lambda text: not any(token in text for token in (*LITERALS, "\U0010fffd"))
)
said = texts.filter(str.strip)
arguments = st.dictionaries(texts, texts | st.integers() | st.booleans() | st.none(), max_size=2)
calls = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": said, "arguments": arguments})}
    ),
    min_size=1,
    max_size=2,
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[Message], list[Any] | None]:
    """Messages that end with an assistant turn, and tools or none."""

    def assistant(**more: Any) -> Message:
        message = {"role": "assistant", "content": draw(said), **more}
        return message | ({"reasoning_content": draw(said)} if draw(st.booleans()) else {})

    messages: list[Message] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(texts)})
        for _ in range(draw(st.integers(0, 2))):
            asked = draw(calls)
            messages.append(assistant(tool_calls=asked) | {"content": draw(texts)})
            messages += [{"role": "tool", "content": draw(texts)} for _ in asked]
        messages.append(assistant())
    tools = draw(st.none() | st.lists(st.just(TOOL) | st.builds(dict, x=texts), min_size=1))
    return messages, tools


class Official:
    """transformers' own rendering and tokenisation of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)

    def text(self, messages: list[Message], tools: list[Any] | None, mode: Mode | None) -> str:
        rendered = self.tokenizer.apply_chat_template(
            messages,
            tools,
            tokenize=False,
            add_generation_prompt=mode is not None,
            enable_thinking=mode != "direct",
        )
        return str(rendered)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="session")
def official(tiny_base: Path) -> Official:
    return Official(tiny_base)


def assert_chat_is_official(
    chat: Chat, official: Official, messages: list[Message], tools: list[Any] | None
) -> None:
    """The same text and ids for every prompt, for the whole, and for each turn's row."""
    whole = official.text(messages, tools, None)
    assert chat.render(messages, tools, None) == whole
    assert chat.encode(whole) == official.ids(whole)
    turns = list(chat.turns(messages, tools))
    assert [turn.index for turn in turns] == [
        index for index, message in enumerate(messages) if message["role"] == "assistant"
    ]
    for turn in turns:
        before = messages[: turn.index]
        assert turn.mode == (
            "thinking" if "reasoning_content" in messages[turn.index] else "direct"
        )
        assert turn.prompt == official.text(before, tools, turn.mode)
        assert turn.prompt_ids == official.ids(turn.prompt)
        assert turn.prompt_ids == chat.prompt_ids(before, tools, turn.mode)
        row = turn.prompt + turn.completion
        assert row + "\n" == official.text(messages[: turn.index + 1], tools, None)
        assert turn.prompt_ids + turn.completion_ids == official.ids(row)
        assert turn.completion_ids[-1] == official.ids("<|im_end|>")[0]
    assert turns[-1].prompt + turns[-1].completion + "\n" == whole


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(conversation=conversations())
def test_text_and_ids_of_any_conversation_are_the_official_ones(
    chat: Chat, official: Official, conversation: tuple[list[Message], list[Any] | None]
) -> None:
    assert_chat_is_official(chat, official, *conversation)


def test_any_checkpoints_template_is_compiled_as_transformers_compiles_it(
    chat_folder: Path, official: Official, tmp_path: Path
) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    template = """{% for message in messages %}
    {% if message.role == "tool" %}
        {% break %}
    {% endif %}
    {{ message | tojson(indent=2) }} {{ message.content | tojson }}
{% endfor %}
{{ strftime_now("%Y") }} {{ tools | tojson }}
"""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    messages = [*ASK, {"role": "user", "content": "né <b>'&"}, {"role": "tool", "content": "no"}]
    prepared = [{"role": m["role"], "content": m["content"]} for m in messages]

    theirs = official.tokenizer.apply_chat_template(
        prepared, [TOOL], chat_template=template, tokenize=False
    )

    assert Chat(folder).render(messages, [TOOL], None) == theirs


def test_the_vendored_template_is_the_one_in_trl() -> None:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None

    theirs = Path(spec.origin).parent / "chat_templates" / "qwen3.jinja"

    assert VENDORED.read_bytes() == theirs.read_bytes()


def test_the_checkpoints_template_is_the_vendored_one(tiny_base: Path) -> None:
    assert (tiny_base / "chat_template.jinja").read_bytes() == VENDORED.read_bytes()


def test_the_two_modes_differ_in_the_prompt(chat: Chat) -> None:
    thinking, direct = (chat.render(ASK, None, mode) for mode in MODES)

    assert thinking.endswith("<|im_start|>assistant\n")
    assert direct == thinking + "<think>\n\n</think>\n\n"
    assert chat.encode(thinking) != chat.encode(direct)


def test_the_empty_block_is_prompt_in_direct_mode_and_the_block_is_trained_in_thinking_mode(
    chat: Chat,
) -> None:
    direct = next(chat.turns([*ASK, {"role": "assistant", "content": "2"}], None))
    thinking = next(
        chat.turns([*ASK, {"role": "assistant", "reasoning": "1+1", "content": "2"}], None)
    )

    assert (direct.mode, direct.completion) == ("direct", "2<|im_end|>")
    assert thinking.mode == "thinking"
    assert thinking.completion == "<think>\n1+1\n</think>\n\n2<|im_end|>"


def test_an_earlier_turn_loses_its_reasoning_in_a_later_turns_prompt(chat: Chat) -> None:
    first = {"role": "assistant", "reasoning": "hidden", "content": "2"}
    messages = [*ASK, first, *ASK, {"role": "assistant", "content": "2 again"}]

    one, two = chat.turns(messages, None)

    assert "hidden" in one.completion
    assert "hidden" not in two.prompt


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize("shape", ["{}", "a{}b", "{0}{0}", "</think{}>", "<|im_start|{}"])
def test_a_control_token_in_a_message_is_ordinary_text(
    chat: Chat, literal: str, shape: str
) -> None:
    text = shape.format(literal)
    control = {chat.token_id(token) for token in LITERALS}
    call = {"function": {"name": "f", "arguments": {text: text}}}
    tool = {"function": {"name": "f", "description": text, "parameters": {text: [text]}}}

    def rendered(word: str) -> list[int]:
        def put(value: Any) -> Any:
            return json.loads(json.dumps(value).replace(json.dumps(text)[1:-1], word))

        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "reasoning": text, "tool_calls": [call]},
            {"role": "tool", "content": text},
            {"role": "assistant", "content": text, "reasoning": text},
        ]
        return chat.encode(chat.render(put(messages), put([tool]), None))

    ids, plain_ids = rendered(json.dumps(text)[1:-1]), rendered("word")

    assert [i for i in ids if i in control] == [i for i in plain_ids if i in control]
    assert chat.decode(ids) == chat.decode(plain_ids).replace("word", text)


@given(st.lists(st.sampled_from([*LITERALS, "\U0010fffd", "\ue001", "<", "|>", "é", "\n"])))
def test_any_text_of_a_user_comes_back_from_its_ids(chat: Chat, bits: list[str]) -> None:
    text = "".join(bits)
    empty = chat.prompt_ids([{"role": "user", "content": ""}], None, "direct")
    ids = chat.prompt_ids([{"role": "user", "content": text}], None, "direct")

    before, after = chat.decode(empty).split("user\n")
    assert chat.decode(ids) == f"{before}user\n{text}{after}"
    assert sum(i > 255 for i in ids) == sum(i > 255 for i in empty)


def test_a_trained_answer_may_hold_control_tokens_as_text(chat: Chat) -> None:
    answer = "Qwen3 ends a turn with <|im_end|> and thinks in <think></think>."

    turn = next(chat.turns([*ASK, {"role": "assistant", "content": answer}], None))

    assert turn.completion == answer + "<|im_end|>"
    assert chat.decode(turn.completion_ids) == turn.completion
    assert turn.completion_ids.count(chat.end_of_turn_id) == 1


def rendered_alike(chat: Chat, left: Message, right: Message) -> bool:
    return chat.render([*ASK, left], None, None) == chat.render([*ASK, right], None, None)


def test_content_parts_are_joined(chat: Chat) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    for role in ("user", "assistant", "tool"):
        assert rendered_alike(
            chat, {"role": role, "content": parts}, {"role": role, "content": "ab"}
        )


def test_null_content_is_empty(chat: Chat) -> None:
    call = {"function": {"name": "f", "arguments": {}}}

    for message in ({"role": "user"}, {"role": "assistant", "tool_calls": [call]}):
        assert rendered_alike(chat, message | {"content": None}, message | {"content": ""})
        assert rendered_alike(chat, message, message | {"content": ""})


def test_a_part_that_is_not_text_is_refused(chat: Chat) -> None:
    content = [{"type": "image_url", "image_url": {"url": "x"}}]

    with pytest.raises(DataError, match="content part 'image_url' is not text"):
        chat.render([{"role": "user", "content": content}], None, None)


def test_a_developer_is_the_system(chat: Chat) -> None:
    developer, system = (
        chat.render([{"role": role, "content": "Be brief."}, *ASK], None, "direct")
        for role in ("developer", "system")
    )

    assert developer == system
    assert "<|im_start|>system\nBe brief.<|im_end|>" in system


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning": "why"},
        {"reasoning_content": "why"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "why"}]},
        {
            "reasoning_details": [
                {"type": "reasoning.text", "text": "w"},
                {"type": "reasoning.encrypted", "data": "x"},
                {"type": "reasoning.text", "text": "hy"},
            ],
            "reasoning": "not this",
        },
        {"reasoning_details": [], "reasoning": "why"},
    ],
)
def test_reasoning_is_found_in_each_of_its_fields(chat: Chat, fields: Message) -> None:
    turn = next(chat.turns([*ASK, {"role": "assistant", "content": "2", **fields}], None))

    assert turn.mode == "thinking"
    assert turn.completion == "<think>\nwhy\n</think>\n\n2<|im_end|>"


@pytest.mark.parametrize("reasoning", ["", " ", "\n \n", None])
def test_blank_reasoning_is_none(chat: Chat, reasoning: str | None) -> None:
    message = {"role": "assistant", "content": "2", "reasoning": reasoning}

    turn = next(chat.turns([*ASK, message], None))

    assert (turn.mode, turn.completion) == ("direct", "2<|im_end|>")


def test_an_answer_with_a_literal_end_of_thinking_is_not_cut(chat: Chat) -> None:
    answer = "it ends with </think> there"

    turn = next(chat.turns([*ASK, {"role": "assistant", "content": answer}], None))

    assert turn.completion == answer + "<|im_end|>"


@given(arguments)
def test_arguments_as_text_and_as_an_object_render_alike(
    chat: Chat, values: dict[str, Any]
) -> None:
    def message(given: Any) -> Message:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    assert rendered_alike(chat, message(values), message(json.dumps(values)))
    assert rendered_alike(chat, message(values), message(json.dumps(values, indent=1)))


def test_no_arguments_are_an_empty_object(chat: Chat) -> None:
    for nothing in ({}, {"arguments": None}, {"arguments": ""}):
        message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", **nothing}}]}

        assert '{"name": "f", "arguments": {}}' in chat.render([*ASK, message], None, None)


def test_an_assistant_turn_before_any_user_turn_is_context(chat: Chat) -> None:
    hello = {"role": "assistant", "content": "Hello, what may I do?"}

    (turn,) = chat.turns([hello, *ASK, {"role": "assistant", "content": "2"}], None)

    assert turn.index == 2
    assert turn.prompt.startswith("<|im_start|>assistant\n")
    assert "Hello, what may I do?" in turn.prompt
    assert turn.completion == "2<|im_end|>"


def test_a_missing_or_broken_file_is_named(chat_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    template, tokenizer = folder / "chat_template.jinja", folder / "tokenizer.json"

    template.write_text("{% if %}", encoding="utf-8")
    with pytest.raises(BaseError, match="the chat template is not Jinja"):
        Chat(folder)
    template.unlink()
    with pytest.raises(BaseError, match=r"chat_template\.jinja is missing"):
        Chat(folder)
    tokenizer.write_text("{}", encoding="utf-8")
    with pytest.raises(BaseError, match=r"tokenizer\.json is not a tokenizer"):
        Chat(folder)
    tokenizer.unlink()
    with pytest.raises(BaseError, match=r"tokenizer\.json is missing"):
        Chat(folder)


def test_a_template_in_the_tokenizers_config_is_used_too(chat_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    template = folder / "chat_template.jinja"
    config = json.dumps({"chat_template": template.read_text("utf-8")})
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    template.unlink()

    assert Chat(folder).render(ASK, None, "direct") == Chat(chat_folder).render(ASK, None, "direct")


def test_a_template_that_refuses_is_a_data_error(chat_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    template = "{{ raise_exception('no tools here') }}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    with pytest.raises(DataError, match="cannot express these messages: no tools here"):
        Chat(folder).render(ASK, None, None)


def test_a_template_that_rewrites_its_prompt_is_a_data_error(
    chat_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    (folder / "chat_template.jinja").write_text("{{ messages | length }}", encoding="utf-8")

    with pytest.raises(DataError, match="message 1: the template does not continue its own prompt"):
        list(Chat(folder).turns([*ASK, {"role": "assistant", "content": "2"}], None))


TOKENIZER_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"


@pytest.fixture(scope="session")
def qwen3() -> Path:
    """Qwen3's real tokenizer, from a package index, with the official template."""
    return qwen3_dialogue()


def answer(content: str, reasoning: str = "", **more: Any) -> Message:
    message = {"role": "assistant", "content": content, **more}
    return message | ({"reasoning_content": reasoning} if reasoning else {})


def ask(content: str) -> Message:
    return {"role": "user", "content": content}


def chain(reasoning: str) -> list[Message]:
    call = {"function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    return [
        ask("And in Zürich?"),
        answer("", reasoning, tool_calls=[call, call]),
        {"role": "tool", "content": '{"t": 21.5}'},
        {"role": "tool", "content": "sunny ☀️"},
        answer("It is 21.5 °C.", reasoning),
    ]


SYSTEM: Message = {"role": "system", "content": "You are  terse.\n"}
CONVERSATIONS: list[tuple[list[Message], list[Any] | None]] = [
    ([ask("How much is 1+1?"), answer("2")], None),
    ([ask("How much is 1+1?"), answer("2", "One and one\nis two.")], None),
    ([SYSTEM, ask("Hi"), answer("Hello!")], None),
    ([SYSTEM, ask("Hi"), answer("Hello!", "A greeting.")], None),
    ([ask("a"), answer("b"), ask("c"), answer("d")], None),
    ([ask("a"), answer("b", "B"), ask("c"), answer("d"), ask("e"), answer("f", "F")], None),
    ([SYSTEM, *chain("")], [TOOL]),
    ([SYSTEM, *chain("Look it up.")], [TOOL]),
    ([*chain(""), *chain("Again.")], [TOOL]),
    ([ask("weather?"), answer("Where?", "No city.")], [TOOL, TOOL]),
    (
        [ask("日本語で\r\n 1234567 ٣ naïve 👩‍👩‍👧"), answer("はい。\n\n\t```py\nx  = 1\n```\n")],
        None,
    ),
    ([ask("cafe\u0301 \u212b \u1112\u1161\u11ab"), answer("nai\u0308ve \u2126")], None),
]


@pytest.mark.node
def test_the_real_tokenizer_is_the_pinned_one(qwen3: Path) -> None:
    assert hashlib.sha256((qwen3 / "tokenizer.json").read_bytes()).hexdigest() == TOKENIZER_SHA256


@pytest.mark.node
def test_text_and_ids_are_the_official_ones_with_the_real_tokenizer(qwen3: Path) -> None:
    chat, official = Chat(qwen3), Official(qwen3)

    assert chat.encode("<think>\n\n</think>\n\n") == [151667, 271, 151668, 271]
    for messages, tools in CONVERSATIONS:
        assert_chat_is_official(chat, official, messages, tools)
