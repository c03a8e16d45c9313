"""The engine calls of one reply: what each is asked, and that together they tell one reply."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import ScriptedEngine

from pipeline.chat import EARLY_STOP, Chat
from pipeline.engine.protocol import Capability
from pipeline.serve.asking.order import Order, decide
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.offer.catalog import Served
from pipeline.serve.replying.choices import answer_all, whole_usage
from pipeline.serve.replying.events import Called, Ended, Event, Said, Tally

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = ["<tool_call>", '\n{"name": "f", "arguments": {}}\n', "</tool_call>"]
THOUGHT = ["<think>", "\n", "a", "b", "c", "\n", "</think>", "\n\n"]
ABLE: list[Capability] = ["grammar", "logprobs", "logit_bias", "seed"]
JSON = {"type": "json_object"}


class Reply:
    """The events of a reply, and what the engine was asked for them."""

    def __init__(
        self, events: list[tuple[int, Event]], engine: ScriptedEngine, tallies: list[Tally]
    ) -> None:
        self.events = [event for _, event in events]
        self.ends = [event for event in self.events if isinstance(event, Ended)]
        self.reasoning, self.answer = (
            "".join(e.text for e in self.events if isinstance(e, Said) and e.channel == channel)
            for channel in ("reasoning", "answer")
        )
        self.calls = [event.call for event in self.events if isinstance(event, Called)]
        self.usage = whole_usage(tallies)
        self.finish = self.ends[-1].finish
        self.prompts = [prompt for prompt, _ in engine.asked]
        self.samplings = [sampling for _, sampling in engine.asked]


@pytest.fixture
def ask(chat: Chat) -> Any:
    """A request to an engine that says these chunks."""

    def ask(chunks: Sequence[str], able: Sequence[Capability] = ABLE, **fields: Any) -> Reply:
        engine = ScriptedEngine(chunks, able=able)
        order = place(chat, engine, **fields)
        tallies = [Tally() for _ in range(order.num_choices)]

        async def gather() -> list[tuple[int, Event]]:
            async with aclosing(answer_all(order, chat, engine, tallies)) as events:
                return [event async for event in events]

        return Reply(asyncio.run(gather()), engine, tallies)

    return ask


def place(chat: Chat, engine: ScriptedEngine, **fields: Any) -> Order:
    request = ChatRequest.model_validate({"messages": [USER], **fields})
    return decide(request, Served("tiny", chat, engine, 0))


def test_one_engine_call_where_nothing_asks_for_more(ask: Any) -> None:
    reply = ask([*THOUGHT, "yes"])

    assert (reply.reasoning, reply.answer, len(reply.prompts)) == ("abc", "yes", 1)
    assert (reply.samplings[0].stop_tokens, reply.samplings[0].grammar) == ((), None)


def test_a_thought_within_its_budget_goes_on_as_it_would_have(ask: Any, chat: Chat) -> None:
    reply = ask([*THOUGHT, "yes"], reasoning={"max_tokens": 20})

    assert (reply.reasoning, reply.answer, reply.finish) == ("abc", "yes", "stop")
    assert [sampling.max_tokens for sampling in reply.samplings] == [20, 1000 - 7 - len_of(reply)]
    assert reply.prompts[1] == reply.prompts[0] + chat.reply_ids("".join(THOUGHT[:7]))
    assert (reply.usage.reasoning_tokens, reply.usage.completion_tokens) == (7, 10)
    assert reply.usage.prompt_tokens == len_of(reply)


def len_of(reply: Reply) -> int:
    return len(reply.prompts[0])


def test_a_thought_beyond_its_budget_ends_with_qwens_words_which_count_and_do_not_leak(
    ask: Any, chat: Chat
) -> None:
    early = chat.reply_ids(EARLY_STOP)

    reply = ask([*THOUGHT[:4], "yes"], reasoning={"max_tokens": 4})

    assert (reply.reasoning, reply.answer, reply.finish) == ("ab", "yes", "stop")
    assert reply.prompts[1] == reply.prompts[0] + chat.reply_ids("<think>\nab") + early
    assert reply.usage.reasoning_tokens == 4 + len(early)
    assert reply.usage.completion_tokens == 4 + len(early) + 2


def test_no_room_for_those_words_is_the_length(ask: Any) -> None:
    reply = ask([*THOUGHT[:4], "yes"], reasoning={"max_tokens": 4}, max_tokens=20)

    assert (reply.reasoning, reply.answer, reply.finish) == ("ab", "", "length")
    assert (len(reply.prompts), reply.usage.completion_tokens) == (1, 4)


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({"reasoning": {"effort": "high"}, "max_tokens": 100}, 80),
        ({"reasoning_effort": "minimal", "max_tokens": 100}, 10),
        ({"reasoning": {"enabled": True}, "max_tokens": 100}, 50),
        ({"reasoning": {"enabled": True, "effort": "xhigh"}, "max_tokens": 1}, 1),
        ({"reasoning": {"effort": "max"}, "max_tokens": 100}, 95),
        ({"reasoning": {"max_tokens": 500}, "max_tokens": 100}, 99),
        ({"reasoning": {}}, None),
        ({}, None),
        ({"reasoning": {"enabled": False}}, None),
    ],
)
def test_efforts_are_shares_of_max_tokens(chat: Chat, fields: Any, budget: int | None) -> None:
    assert place(chat, ScriptedEngine(), **fields).budget == budget


def test_a_large_request_has_a_least_budget(chat: Chat) -> None:
    engine = ScriptedEngine()
    engine.context_tokens = 50_000

    assert place(chat, engine, reasoning_effort="minimal", max_tokens=2000).budget == 1024
    assert place(chat, engine, reasoning_effort="minimal", max_tokens=20_000).budget == 2000


def test_a_stop_at_the_end_of_the_thought_ends_after_it(ask: Any) -> None:
    reply = ask([*THOUGHT, "yes"], stop="</think>")

    assert (reply.reasoning, reply.answer, reply.finish) == ("abc", "", "stop")
    assert (len(reply.prompts), reply.usage.completion_tokens) == (1, 7)
    assert ask(["y", "es"], stop="</think>", reasoning={"enabled": False}).answer == "yes"


def test_only_the_answer_is_held_to_its_form(ask: Any, chat: Chat) -> None:
    reply = ask([*THOUGHT[:7], '{"a": 1}'], response_format=JSON)

    assert (reply.reasoning, reply.answer) == ("abc", '{"a": 1}')
    first, second = reply.samplings
    assert first.grammar is None
    assert second.grammar is not None
    assert reply.prompts[1] == reply.prompts[0] + chat.reply_ids("".join(THOUGHT))
    assert reply.usage.completion_tokens == 7 + len(chat.reply_ids("\n\n")) + 2
    direct = ask(['{"a": 1}'], response_format=JSON, reasoning={"enabled": False})
    assert (direct.answer, direct.samplings[0].grammar) == ('{"a": 1}', second.grammar)
    # In a string of the form a tag's token would be a tag, and a client's bias brings none back.
    end = chat.token_id("</think>")
    assert second.logit_bias[end] == -100
    assert first.logit_bias == {}
    bias = {str(end): 100, "5": 3}
    biased = ask(['{"a": 1}'], response_format=JSON, logit_bias=bias, reasoning={"enabled": False})
    assert (biased.samplings[0].logit_bias[end], biased.samplings[0].logit_bias[5]) == (-100, 3)
    either = ask(['{"a": 1}'], response_format=JSON, tools=[TOOL], reasoning={"enabled": False})
    assert chat.token_id("<tool_call>") not in either.samplings[0].logit_bias


@pytest.mark.parametrize("chunks", [["y", "es"], ["<", "b>"], ["\n", "yes"], ["<think", "er>"]])
def test_a_reply_without_a_thought_is_asked_for_anew(ask: Any, chunks: list[str]) -> None:
    reply = ask(chunks, tools=[TOOL])

    assert (reply.reasoning, reply.answer) == ("", "".join(chunks).lstrip("\n"))
    assert reply.prompts[0] == reply.prompts[1]
    assert [stop.text for stop in reply.samplings[1].stop_tokens] == ["<tool_call>"]
    assert (reply.usage.reasoning_tokens, reply.usage.completion_tokens) == (0, len(chunks) + 1)


def test_a_thought_that_never_ends_still_gives_the_form_it_owes(ask: Any) -> None:
    reply = ask(["<think>", "hm"], response_format=JSON)

    assert reply.reasoning == "hm"
    assert (len(reply.prompts), reply.samplings[1].grammar is not None) == (2, True)


def test_an_opened_call_is_held_to_the_tools(ask: Any, chat: Chat) -> None:
    direct = {"enabled": False}
    reply = ask(["Look:", "\n", *CALL], tools=[TOOL], reasoning=direct)

    assert (reply.answer, [call.name for call in reply.calls]) == ("Look:", ["f"])
    assert reply.finish == "tool_calls"
    assert [sampling.grammar is not None for sampling in reply.samplings] == [False, True]
    assert reply.prompts[1] == reply.prompts[0] + chat.reply_ids("Look:\n<tool_call>")
    assert reply.usage.completion_tokens == 3 + 2 + 1


def test_a_call_in_a_thought_is_a_thought(ask: Any) -> None:
    chunks = ["<think>", "\n", *CALL, "\n", "</think>", "\n\n", "No."]
    for fields in ({"tools": [TOOL]}, {}):
        reply = ask(chunks, **fields)

        assert (reply.calls, reply.answer) == ([], "No.")
        assert reply.reasoning == '\n{"name": "f", "arguments": {}}\n'.lstrip()
        assert reply.finish == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
@pytest.mark.parametrize("thinks", [True, False])
def test_a_call_that_must_be_is_opened_for_the_model(
    ask: Any, chat: Chat, choice: Any, thinks: bool
) -> None:
    chunks = [*(THOUGHT[:7] if thinks else []), *CALL[1:]]

    reply = ask(chunks, tools=[TOOL], tool_choice=choice, reasoning={"enabled": thinks})

    assert ([call.name for call in reply.calls], reply.finish) == (["f"], "tool_calls")
    assert (reply.answer, reply.reasoning) == ("", "abc" if thinks else "")
    assert reply.samplings[-1].grammar is not None
    assert reply.prompts[-1][-1] == chat.token_id("<tool_call>")


def test_logprobs_are_of_the_answer_alone(ask: Any) -> None:
    chunks = [*THOUGHT[:7], "\n\n", "y", "es", "STOP", "no"]

    reply = ask(chunks, logprobs=True, top_logprobs=2, stop="STOP")

    assert [sampling.top_logprobs for sampling in reply.samplings] == [None, 2]
    tokens = [token.id for e in reply.events if isinstance(e, Said) for token in e.logprobs]
    assert (reply.answer, tokens) == ("yes", [8, 9])


def test_text_that_is_held_back_keeps_its_logprobs(ask: Any) -> None:
    reply = ask(["a", "S", "TO", "x"], logprobs=True, stop="STOP", reasoning={"enabled": False})

    tokens = [token.id for e in reply.events if isinstance(e, Said) for token in e.logprobs]
    assert (reply.answer, tokens) == ("aSTOx", [0, 1, 2, 3])


def test_a_tag_that_does_not_show_has_no_logprob(ask: Any) -> None:
    begun = [USER, {"role": "assistant", "content": "So"}]

    for messages, chunks, said in (
        ([USER], ["I", "</think>", "\n\n", "am", "."], [0, 3, 4]),
        (begun, ["\n", "I"], [0, 1]),
    ):
        reply = ask(chunks, messages=messages, logprobs=True, reasoning={"enabled": False})
        tokens = [token.id for e in reply.events if isinstance(e, Said) for token in e.logprobs]
        assert tokens == said


def test_choices_have_seeds_of_their_own_and_one_prompt(ask: Any) -> None:
    reply = ask(["a", "b"], n=3, seed=5, reasoning={"enabled": False})

    assert sorted(sampling.seed for sampling in reply.samplings) == [5, 6, 7]
    assert len(reply.ends) == 3
    assert reply.answer.count("a") == 3
    assert reply.usage.prompt_tokens == len(reply.prompts[0])
    assert reply.usage.completion_tokens == 9


def test_one_choice_that_fails_ends_all(chat: Chat) -> None:
    engine = ScriptedEngine(["a"] * 50, fails_at=20, delay_s=0.001)
    order = place(chat, engine, n=4)
    tallies = [Tally() for _ in range(4)]

    async def gather() -> None:
        async with aclosing(answer_all(order, chat, engine, tallies)) as events:
            async for _ in events:
                pass

    with pytest.raises(Exception, match="has died"):
        asyncio.run(gather())
    assert engine.num_open == 0


def test_an_answer_that_has_begun_goes_on(ask: Any, chat: Chat) -> None:
    begun = {"role": "assistant", "content": "My favourite is"}

    reply = ask(["\ngreen", "."], messages=[USER, begun])

    assert reply.answer == "\ngreen."
    assert reply.prompts[0] == chat.prompt_ids([USER], None, "direct") + chat.reply_ids(
        "My favourite is"
    )
    thought = begun | {"reasoning": "Hm."}
    reply = ask([" green."], messages=[USER, thought])
    assert chat.decode(reply.prompts[0]).endswith("<think>\nHm.\n</think>\n\nMy favourite is")


@pytest.mark.parametrize(
    ("chunks", "reasoning", "answer"),
    [
        (["<think>", "a<tool_", "<think>", "call>", "b", "</think>", "c"], "a<tool_callb", "c"),
        (["a<thi", "</tool_call>", "nk>", ">", "b"], "", "a<thinkb"),
    ],
)
def test_what_stands_around_a_tag_makes_no_tag(
    ask: Any, chunks: list[str], reasoning: str, answer: str
) -> None:
    reply = ask(chunks)

    assert (reply.reasoning, reply.answer) == (reasoning, answer)


def test_a_call_that_is_none_breaks_no_form(ask: Any) -> None:
    chunks = ['{"a": "', "<tool_call>", '"}']

    reply = ask(chunks, response_format=JSON, reasoning={"enabled": False})

    assert (reply.answer, reply.finish) == ('{"a": ""}', "stop")


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
BITS = [*TAGS, "\n", "\n\n", "a", CALL[1], "{", "<thi", "nk>", "</tool_", "call>"]
FIELDS: list[dict[str, Any]] = [
    {},
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": "required"},
    {"tools": [TOOL], "parallel_tool_calls": False},
    {"response_format": JSON},
    {"response_format": JSON, "tools": [TOOL]},
    {"logprobs": True},
    {"stop": ["</think>", "a{"]},
]


@given(
    st.lists(st.sampled_from(BITS), max_size=9),
    st.sampled_from(FIELDS),
    st.sampled_from([{}, {"max_tokens": 2}, {"max_tokens": 5}, {"enabled": False}]),
    st.integers(1, 90),
)
def test_whatever_a_model_says_no_tag_leaks_and_the_counts_add_up(
    chat: Chat, chunks: list[str], fields: dict[str, Any], reasoning: Any, max_tokens: int
) -> None:
    engine = ScriptedEngine(chunks, able=ABLE)
    order = place(chat, engine, **fields, reasoning=reasoning, max_tokens=max_tokens)
    tallies = [Tally()]

    async def gather() -> list[tuple[int, Event]]:
        async with aclosing(answer_all(order, chat, engine, tallies)) as events:
            return [event async for event in events]

    reply = Reply(asyncio.run(gather()), engine, tallies)
    said = f"{reply.reasoning}|{reply.answer}"
    assert not any(tag in said for tag in TAGS)
    assert "Considering" not in said
    assert 0 <= reply.usage.reasoning_tokens <= reply.usage.completion_tokens
    assert reply.usage.completion_tokens <= max_tokens
    assert len(reply.ends) == 1
    assert engine.num_open == 0
    assert all(sampling.max_tokens >= 1 for sampling in reply.samplings)
