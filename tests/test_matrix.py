"""Every parameter over a real engine and the base golden, streamed and not: both say the same."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from asking import Refused, Replies, Server, run_server

from pipeline.base.golden_dialogues import (
    DIALOGUES,
    DRAW,
    TOOLS,
    make_row,
)
from pipeline.base.make import make_base
from pipeline.chat import EARLY_STOP, Chat, parse_reply

pytestmark = [pytest.mark.node, pytest.mark.slow]
DIRECT = {"reasoning": {"enabled": False}}
CONTEXT_TOKENS = 1024
COMMA = 11
ENGINES = ["llamacpp", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.fixture(scope="module", params=ENGINES)
def server(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    lora = folder / "golden-lora"
    make_base("golden-lora", "", lora)
    options = ["--engine", request.param, "--adapter", f"flipped={lora}"]
    options += ["--context-tokens", str(CONTEXT_TOKENS)]
    with run_server(golden, folder / "books.sqlite", *options) as server:
        yield server


@pytest.fixture(scope="module")
def chat(golden: Path) -> Chat:
    return Chat(golden)


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def ask(server: Server, question: str | list[Any], **fields: Any) -> Replies:
    """Greedily unless told otherwise, and both ways."""
    messages = user(question) if isinstance(question, str) else question
    fields = {"messages": messages, "temperature": 0, **fields}
    whole, streamed = (server.ask(stream, **fields) for stream in (False, True))
    assert whole.choices == streamed.choices
    # What is cached of a prompt is more the second time.
    for usage in (whole.usage, streamed.usage):
        usage.pop("prompt_tokens_details")
    assert whole.usage == streamed.usage
    return whole


def test_every_dialogue_is_said_as_it_was_learnt_and_counted(server: Server, chat: Chat) -> None:
    for name, dialogue in DIALOGUES.items():
        if dialogue.begun:
            continue
        row = make_row(chat, name, dialogue)
        mode = "thinking" if "<think>" not in chat.decode(row.prompt_ids)[-30:] else "direct"
        expected = parse_reply(chat.decode(row.completion_ids[:-1]), mode)

        reply = ask(
            server,
            dialogue.messages[:-1],
            tools=dialogue.tools,
            reasoning=None if mode == "thinking" else {"enabled": False},
        )

        assert (reply.reasoning, reply.answer) == (expected.reasoning, expected.answer), name
        calls = [(call.name, call.arguments) for call in expected.calls]
        assert reply.calls == calls, name
        assert reply.finish == ("tool_calls" if calls else "stop")
        counts = (reply.usage["prompt_tokens"], reply.usage["completion_tokens"])
        assert counts == (len(row.prompt_ids), len(row.completion_ids)), name
        thought = reply.usage["completion_tokens_details"]["reasoning_tokens"]
        end = chat.token_id("</think>")
        ids = row.completion_ids
        assert thought == (ids.index(end) + 1 if end in ids else 0), name


def test_a_budget_ends_a_thought_and_the_answer_still_comes(server: Server, chat: Chat) -> None:
    early = len(chat.reply_ids(EARLY_STOP))
    for budget in (2, 8):
        reply = ask(server, "Count to 90 in your mind.", reasoning={"max_tokens": budget})

        assert reply.answer == "I have counted to ninety."
        assert "Considering" not in reply.reasoning
        details = reply.usage["completion_tokens_details"]
        assert details["reasoning_tokens"] == budget + early
    low = ask(server, "Count to 90 in your mind.", reasoning={"effort": "low"}, max_tokens=100)
    assert low.usage["completion_tokens_details"]["reasoning_tokens"] == 20 + early
    short = ask(server, "Count to 90 in your mind.", reasoning={"max_tokens": 8}, max_tokens=20)
    assert (short.answer, short.finish) == ("", "length")


def test_reasoning_can_be_hidden_switched_off_and_asked_for_in_the_text(server: Server) -> None:
    question = "What is the capital of France?"
    hidden = ask(server, question, reasoning={"exclude": True})
    assert (hidden.reasoning, hidden.answer) == ("", "The capital of France is Paris.")
    assert hidden.usage["completion_tokens_details"]["reasoning_tokens"] > 5
    assert ask(server, question, include_reasoning=False).reasoning == ""
    for off in (DIRECT, {"reasoning_effort": "none"}, {"reasoning": {"max_tokens": 0}}):
        reply = ask(server, question, **off)
        assert (reply.reasoning, reply.answer) == ("", "The capital of France is Paris.")
        assert reply.usage["completion_tokens_details"]["reasoning_tokens"] == 0
    assert ask(server, f"{question} /no_think").reasoning == ""
    assert ask(server, f"{question} /think").reasoning == "France is a country. I recall Paris."


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "reasoning_details"])
def test_reasoning_handed_back_reaches_the_model(server: Server, chat: Chat, field: str) -> None:
    dialogue = DIALOGUES["one_result+thought"]
    question, call, result, _ = dialogue.messages
    thought = call["reasoning"]
    details = [{"type": "reasoning.text", "text": part} for part in (thought[:5], thought[5:])]
    value = details if field == "reasoning_details" else thought
    call = {key: text for key, text in call.items() if key != "reasoning"} | {field: value}

    reply = ask(server, [question, call, result], tools=TOOLS)

    assert (reply.reasoning, reply.answer) == ("The sky is clear.", "The sky over Paris is clear.")
    ids = make_row(chat, "one_result+thought", dialogue).prompt_ids
    assert reply.usage["prompt_tokens"] == len(ids)


def test_stops_end_the_answer_and_pass_the_thought(server: Server) -> None:
    question = "Say the words around the stop."
    for stop, answer in (
        ("STOP", "one two "),
        (["###", "thr"], "one two STOP "),
        ("ee ### f", "one two STOP thr"),
        ("never", "one two STOP three ### four"),
    ):
        for fields in ({}, DIRECT):
            reply = ask(server, question, stop=stop, **fields)
            assert (reply.answer, reply.finish) == (answer, "stop")
            assert reply.reasoning == ("" if fields else "One, two, STOP, three.")
    reply = ask(server, question, stop="</think>")
    assert (reply.reasoning, reply.answer) == ("One, two, STOP, three.", "")


def test_no_character_is_ever_cut(server: Server) -> None:
    for fields in ({}, DIRECT):
        expected = "👩‍👩‍👧‍👦 龘靐齉 x\u0323\u0302 नमस्ते 🏴‍☠️ done"
        assert ask(server, "Show me Unicode.", **fields).answer == expected
        for stop in ("靐", "‍☠"):
            cut = ask(server, "Show me Unicode.", stop=stop, **fields).answer
            assert cut == expected.partition(stop)[0]


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "country": {"type": "string"},
        "sea": {"type": "boolean"},
        "near": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city", "country", "sea", "near"],
    "additionalProperties": False,
}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@pytest.mark.parametrize("reasoning", [{}, {"enabled": False}, {"exclude": True}])
def test_the_answer_alone_has_its_form(server: Server, reasoning: Any) -> None:
    thinks = reasoning == {}
    oslo = ask(
        server, "Describe Oslo as JSON.", response_format=schema_format(SCHEMA), reasoning=reasoning
    )
    assert json.loads(oslo.answer)["near"] == ["Moss", "Ski"]
    assert oslo.reasoning == ("Oslo lies in Norway, by the sea." if thinks else "")
    free = {"type": "json_object"}
    ada = ask(server, "Describe Ada as JSON.", response_format=free, reasoning=reasoning)
    assert json.loads(ada.answer) == {"name": "Ada", "age": 36}
    # A model that would say something else must follow, too.
    schema = {"enum": ["red", "green"]}
    forced = ask(server, "Who are you?", response_format=schema_format(schema), reasoning=reasoning)
    assert json.loads(forced.answer) in ("red", "green")
    words = {"type": "grammar", "grammar": 'start: "yes" | "no"'}
    assert ask(server, "Who are you?", response_format=words, reasoning=reasoning).answer in (
        "yes",
        "no",
    )
    assert forced.finish == "stop"


@pytest.mark.parametrize(
    "form",
    [
        schema_format({"type": "nonsense"}),
        schema_format({"$ref": "#/nowhere"}),
        {"type": "grammar", "grammar": "start: ("},
        {"type": "json_schema"},
        {"type": "xml"},
    ],
)
def test_a_bad_form_is_refused_before_any_token(server: Server, form: Any) -> None:
    with pytest.raises(Refused) as caught:
        ask(server, "Who are you?", response_format=form)
    assert (caught.value.status, caught.value.error_type) == (400, "invalid_request")
    assert "response_format" in str(caught.value)


PARIS, OSLO = '{"city": "Paris"}', '{"city": "Oslo"}'


@pytest.mark.parametrize("fields", [{}, DIRECT])
def test_tools_are_called_as_asked(server: Server, fields: Any) -> None:
    weather = "How is the weather in Paris?"
    both = "How is the weather in Rome, and how late is it in Oslo?"
    asking = {"tools": TOOLS, **fields}
    one = ask(server, weather, **asking)
    assert (one.calls, one.finish) == ([("get_weather", PARIS)], "tool_calls")
    two = ask(server, both, **asking)
    assert two.calls == [("get_weather", '{"city": "Rome"}'), ("get_time", OSLO)]
    single = ask(server, both, parallel_tool_calls=False, **asking)
    assert single.calls == two.calls[:1]
    assert ask(server, "Hello!", **asking).answer == "Hello! How are you?"
    none = ask(server, weather, tool_choice="none", **asking)
    assert (none.calls, none.answer) == ([], "I cannot look up the weather.")
    required = ask(server, "Hello!", tool_choice="required", **asking)
    assert required.calls[0] == ("get_weather", '{"city": "Rome"}')
    choice = {"type": "function", "function": {"name": "get_time"}}
    named = ask(server, "Hello!", tool_choice=choice, **asking)
    assert (named.finish, [name for name, _ in named.calls]) == ("tool_calls", ["get_time"])
    assert named.reasoning == ("" if fields else "A greeting needs no tool.")


def test_a_schema_holds_for_arguments_the_model_would_not_give(server: Server) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Bergen"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": city}}

    reply = ask(server, "How is the weather in Paris?", tools=[tool], tool_choice="required")

    assert json.loads(reply.calls[0][1]) == {"city": "Bergen"}


def test_an_answer_or_calls_where_both_are_allowed(server: Server) -> None:
    fields = {"tools": TOOLS, "response_format": {"type": "json_object"}, **DIRECT}
    assert ask(server, "How is the weather in Paris?", **fields).calls == [("get_weather", PARIS)]


def test_an_assistants_last_message_is_continued(server: Server) -> None:
    begun = {"role": "assistant", "content": "My favourite is"}
    for fields in ({}, DIRECT):
        reply = ask(server, [*user("Name a colour."), begun], **fields)
        assert (reply.reasoning, reply.answer) == ("", " green.")


@pytest.mark.parametrize("fields", [{}, DIRECT])
def test_logprobs_are_of_the_answers_tokens(server: Server, chat: Chat, fields: Any) -> None:
    reply = ask(server, "What is the capital of France?", logprobs=True, top_logprobs=3, **fields)

    assert reply.logprob_bytes == b"The capital of France is Paris."
    for token in reply.logprobs:
        assert -0.2 < token["logprob"] <= 0
        assert len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0]["token"] == token["token"]
        assert token["top_logprobs"][0]["logprob"] == pytest.approx(token["logprob"], abs=1e-3)
    plain = ask(server, "What is the capital of France?", logprobs=True, **fields)
    assert all(token["top_logprobs"] == [] for token in plain.logprobs)
    assert ask(server, "What is the capital of France?", **fields).logprobs == []


def test_a_bias_moves_a_token(server: Server, chat: Chat) -> None:
    (blue,) = chat.text_ids("Blue")
    reply = ask(server, "Name a colour.", logit_bias={str(blue): -100}, max_tokens=4, **DIRECT)
    assert not reply.answer.startswith("Blue")
    (red,) = chat.text_ids("Red")
    reply = ask(server, "Name a colour.", logit_bias={str(red): 100}, max_tokens=1, **DIRECT)
    assert reply.answer == "Red"
    with pytest.raises(Refused, match="no token id") as caught:
        ask(server, "Name a colour.", logit_bias={"151999": 1})
    assert caught.value.status == 400


def draw(server: Server, **fields: Any) -> str:
    return str(server.ask(messages=user(DRAW), **{"temperature": 1, **DIRECT, **fields}).answer)


def test_sampling_is_what_is_asked_for(server: Server) -> None:
    free = {"top_p": 1, "top_k": 0}
    seeded = [draw(server, seed=seed, **free) for seed in range(12)]
    assert len(set(seeded)) > 1
    assert [draw(server, seed=seed, **free) for seed in range(12)] == seeded
    assert server.ask(True, messages=user(DRAW), temperature=1, seed=3, **free, **DIRECT).answer
    for cut in ({"top_k": 1, "top_p": 1}, {"top_p": 0.3}, {"min_p": 0.9, **free}):
        assert {draw(server, seed=seed, **cut) for seed in range(6)} == {"Red."}
    assert draw(server, temperature=0) == "Red."
    hot = {draw(server, seed=seed, temperature=2, max_tokens=1, **free) for seed in range(8)}
    assert len(hot) > 1


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 2}]
)
def test_a_penalty_changes_what_repeats(server: Server, penalty: Any) -> None:
    fields = {"max_tokens": 60, **DIRECT}
    plain = ask(server, "Count to 40.", logprobs=True, top_logprobs=2, **fields)
    commas = [token for token in plain.logprobs if token["token"] == ","]
    leads = [first["logprob"] - second["logprob"] for first, second in map(top_two, commas)]
    close = {str(COMMA): 1.0 - min(leads)}  # every comma wins, some by a hair
    assert ask(server, "Count to 40.", logit_bias=close, **fields).answer == plain.answer
    changed = ask(server, "Count to 40.", logit_bias=close, **penalty, **fields)
    assert changed.answer != plain.answer


def top_two(token: Any) -> Any:
    return token["top_logprobs"]


def test_several_choices(server: Server) -> None:
    fields = {"temperature": 1, "top_p": 1, "top_k": 0, "seed": 1, **DIRECT}
    one = ask(server, DRAW, n=8, **fields)
    assert len(one.choices) == 8
    assert len({choice.answer for choice in one.choices}) > 1
    assert one.usage["completion_tokens"] == 8 * 3
    with pytest.raises(Refused):
        ask(server, DRAW, n=9)


def test_lengths_and_the_window(server: Server) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        reply = ask(server, "Count to 40.", **{name: 5}, **DIRECT)
        assert (reply.finish, reply.usage["completion_tokens"]) == ("length", 5)
    with pytest.raises(Refused, match=r"maximum context length is 1024 tokens\. However, you") as c:
        ask(server, "Who are you?", max_tokens=CONTEXT_TOKENS)
    assert (c.value.status, c.value.error_type) == (400, "context_length_exceeded")
    assert ask(server, "Who are you?", prediction={"type": "content", "content": "x"}).answer


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_other_parts_have_no_endpoint(server: Server, kind: str) -> None:
    with pytest.raises(Refused, match="No endpoints found that support") as caught:
        ask(server, [{"role": "user", "content": [{"type": kind}]}])
    assert caught.value.status == 404


def test_an_adapter_is_a_model_of_its_own(server: Server) -> None:
    flipped = Server(server.url, server.key, "local/flipped")
    question = "What is the capital of France?"
    assert ask(flipped, question, **DIRECT).answer == "The capital of France is Rome."
    assert ask(server, question, **DIRECT).answer == "The capital of France is Paris."
    assert ask(flipped, question).answer == "The capital of France is Paris."


def test_parallel_streams_on_different_adapters_never_mix(server: Server) -> None:
    flipped = Server(server.url, server.key, "local/flipped")
    answers = {server: "The capital of France is Paris.", flipped: "The capital of France is Rome."}
    jobs = [server, flipped] * 10

    def say(at: Server) -> str:
        question = user("What is the capital of France?")
        return str(at.ask(True, messages=question, temperature=0, **DIRECT).answer)

    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(say, jobs)) == [answers[at] for at in jobs]


def test_who_has_no_key_is_not_answered(server: Server) -> None:
    for key, words in (("", "Missing"), ("sk-or-v1-wrong", "User not found")):
        with pytest.raises(Refused, match=words) as caught:
            Server(server.url, key).ask(messages=user("Hello!"))
        assert caught.value.status == 401
