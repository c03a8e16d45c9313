"""Orders and events, over a scripted engine."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.engine.protocol import Capability
from pipeline.errors import RequestError
from pipeline.serve.asking.order import Order, decide
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.offer.catalog import Served
from pipeline.serve.replying.dialogue import answer
from pipeline.serve.replying.events import Called, Ended, Event, Said, Tally
from pipeline.serve.replying.stops import StopStrings

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture
def order(chat: Chat) -> Any:
    def place(able: Sequence[Capability] = (), **fields: Any) -> Order:
        request = ChatRequest.model_validate({"messages": [USER], **fields})
        return decide(request, Served("tiny", chat, ScriptedEngine(able=able), 0))

    return place


def told(
    order: Order, chat: Chat, engine: ScriptedEngine, tally: Tally | None = None
) -> list[Event]:
    async def gather() -> list[Event]:
        async with aclosing(answer(order, chat, engine, tally or Tally())) as events:
            return [event async for event in events]

    return asyncio.run(gather())


@pytest.fixture
def run(chat: Chat) -> Any:
    return lambda order, engine, tally=None: told(order, chat, engine, tally)


def text(events: list[Event], channel: str) -> str:
    return "".join(e.text for e in events if isinstance(e, Said) and e.channel == channel)


def end(events: list[Event]) -> Ended:
    assert isinstance(events[-1], Ended)
    return events[-1]


def test_thinking_is_the_default_and_has_its_sampling(order: Any) -> None:
    placed = order()

    assert placed.mode == "thinking"
    sampling = placed.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.95, 20)
    assert sampling.max_tokens == 1000 - len(placed.prompt_ids)


@pytest.mark.parametrize("reasoning", [{"enabled": False}, {"effort": "none"}, {"max_tokens": 0}])
def test_thinking_can_be_switched_off(order: Any, reasoning: dict[str, Any]) -> None:
    placed = order(reasoning=reasoning, temperature=1)

    assert placed.mode == "direct"
    assert (placed.sampling.temperature, placed.sampling.top_p) == (1.0, 0.8)
    assert placed.ignored == ()
    assert order(reasoning_effort="none").mode == "direct"


def test_reasoning_is_counted_through_its_end_tag(order: Any, run: Any) -> None:
    chunks = ["<think>", "\n", "hm", "\n", "</think>", "\n\n", "yes"]

    events = run(order(), ScriptedEngine(chunks), tally := Tally())

    assert (text(events, "reasoning"), text(events, "answer")) == ("hm", "yes")
    usage = tally.usage
    assert (usage.reasoning_tokens, usage.completion_tokens, usage.cached_tokens) == (5, 8, 3)
    assert end(events).finish == "stop"


def test_a_stop_string_ends_the_answer_but_not_the_reasoning(order: Any, run: Any) -> None:
    engine = ScriptedEngine(["<think>", "STOP", "</think>", "a S", "TO", "x ST", "OP", "b", "c"])

    events = run(order(stop="STOP"), engine)

    assert (text(events, "reasoning"), text(events, "answer")) == ("STOP", "a STOx ")
    assert end(events).finish == "stop"
    assert (engine.num_given, engine.num_open) == (7, 0)


def test_calls_are_events_and_the_finish(order: Any, run: Any) -> None:
    engine = ScriptedEngine(["Look:\n", CALL, "\n", CALL])

    events = run(order(tools=[TOOL]), engine)

    calls = [event for event in events if isinstance(event, Called)]
    assert [(call.index, call.call.arguments) for call in calls] == [
        (0, '{"a": 1}'),
        (1, '{"a": 1}'),
    ]
    assert text(events, "answer") == "Look:"
    assert (end(events).finish, end(events).native_finish) == ("tool_calls", "stop")


def test_one_call_at_most_where_parallel_calls_are_unwanted(order: Any, run: Any) -> None:
    events = run(order(tools=[TOOL], parallel_tool_calls=False), ScriptedEngine([CALL, CALL]))

    assert sum(isinstance(event, Called) for event in events) == 1
    assert end(events).finish == "tool_calls"


def test_text_held_back_for_a_stop_is_not_lost_behind_a_call(order: Any, run: Any) -> None:
    placed = order(tools=[TOOL], stop="!!", parallel_tool_calls=False)

    assert text(run(placed, ScriptedEngine(["Look!", CALL])), "answer") == "Look!"


def test_text_held_back_for_a_stop_comes_before_the_call_and_no_stop_reaches_across_it(
    order: Any,
    run: Any,
) -> None:
    events = run(order(tools=[TOOL], stop="!!"), ScriptedEngine(["Look!", CALL, "! More"]))

    heard = [event.text if isinstance(event, Said) else "CALL" for event in events[:-1]]
    assert "".join(heard) == "Look!CALL! More"


@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL], "tool_choice": "none"}])
def test_a_call_nobody_can_answer_is_text(order: Any, run: Any, fields: dict[str, Any]) -> None:
    events = run(order(**fields), ScriptedEngine([CALL]))

    assert '"name": "f"' in text(events, "answer")
    assert end(events).finish == "stop"


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"response_format": {"type": "json_object"}}, 404, "support response_format"),
        ({"modalities": ["text", "image"]}, 404, "output modalities: image, text"),
        (
            {"tool_choice": "required", "tools": [TOOL]},
            404,
            "support the provided 'tool_choice' value.",
        ),
        ({"tool_choice": "required"}, 400, "a call is required, but there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "no tools"),
        ({"top_logprobs": 3}, 400, "send logprobs: true"),
        ({"logit_bias": {"9999": 1}}, 400, "'9999' is no token id"),
        ({"logit_bias": {"-1": 1}}, 400, "'-1' is no token id"),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
                ]
            },
            400,
            "the last message calls tools",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            404,
            "No endpoints found that support image input",
        ),
        ({"reasoning": {"effort": "low", "max_tokens": 5}}, 400, "Only one of"),
        ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, 400, "differ"),
        (
            {"reasoning": {"enabled": False, "effort": "high"}},
            400,
            '"reasoning.effort": "high" and "reasoning.enabled": false contradict',
        ),
        (
            {"reasoning": {"enabled": True, "effort": "none"}},
            400,
            '"reasoning.enabled": true and "reasoning.effort": "none" contradict',
        ),
        (
            {"reasoning": {"enabled": True, "max_tokens": 0}},
            400,
            '"reasoning.enabled": true and "reasoning.max_tokens": 0 contradict',
        ),
        (
            {"reasoning": {"enabled": False, "max_tokens": 9}},
            400,
            '"reasoning.max_tokens": 9 and "reasoning.enabled": false contradict',
        ),
        (
            {"reasoning": {"enabled": False}, "reasoning_effort": "low"},
            400,
            '"reasoning_effort": "low" and "reasoning.enabled": false contradict',
        ),
        ({"max_tokens": 1000}, 400, "maximum context length is 1000 tokens"),
        ({"messages": [{"role": "user", "content": "x" * 1000}]}, 400, "maximum context length"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    order: Any, fields: dict[str, Any], status: int, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        order(**fields)

    assert caught.value.status == status


def test_what_is_ignored_is_named(order: Any) -> None:
    placed = order(
        reasoning={"max_tokens": 9, "summary": "auto"}, logprobs=True, top_a=0.1, user="me", zz=None
    )

    assert set(placed.ignored) == {"logprobs", "top_a", "reasoning.summary"}
    assert order(["logprobs"], logprobs=True, top_logprobs=3).ignored == ()
    assert order(logprobs=True, top_logprobs=3).ignored == ("logprobs", "top_logprobs")
    assert order(seed=3, priority=1).ignored == ("priority", "seed")
    assert order(reasoning={"effort": "high"}).ignored == ()
    assert order(max_tokens=5, max_completion_tokens=6).ignored == ("max_tokens",)
    assert order(max_tokens=5, max_completion_tokens=6).sampling.max_tokens == 6
    assert order(max_tokens=5, max_completion_tokens=5).ignored == ()
    both = order(reasoning={"exclude": True}, include_reasoning=True)
    assert (both.ignored, both.shows_reasoning) == (("include_reasoning",), False)
    assert order(reasoning={"exclude": True}, include_reasoning=False).ignored == ()


def test_what_agrees_on_thinking_is_no_contradiction(order: Any) -> None:
    assert order(reasoning={"enabled": False, "effort": "none"}).mode == "direct"
    assert order(reasoning={"enabled": False, "max_tokens": 0}).mode == "direct"
    assert order(reasoning={"enabled": True, "effort": "high"}).mode == "thinking"
    assert order(reasoning={"enabled": True}, reasoning_effort="low").mode == "thinking"


def test_what_is_ignored_of_messages_is_named_once(order: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    spoken = {"role": "assistant", "content": None, "refusal": None, "reasoning": "hm"}
    placed = order(
        messages=[
            {**USER, "name": "me", "cache_control": {"type": "ephemeral"}},
            {**spoken, "tool_calls": [call], "name": "you"},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
            {**USER, "reasoning": "hm"},
        ]
    )

    assert placed.ignored == ("messages[].name", "messages[].reasoning")


BITS = ["<think>", "</think>", "\n", "a", "STO", "P", "<tool_call>", "</tool_call>", CALL]


@given(st.lists(st.sampled_from(BITS), max_size=10).map("".join), st.data())
def test_events_do_not_depend_on_chunks(chat: Chat, spoken: str, data: st.DataObject) -> None:
    fields = {"messages": [USER], "tools": [TOOL], "stop": "STOP"}
    served = Served("tiny", chat, ScriptedEngine(), 0)
    placed = decide(ChatRequest.model_validate(fields), served)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(spoken)))))
    chunks = [spoken[a:b] for a, b in pairwise([0, *cuts, len(spoken)])]

    one, many = (told(placed, chat, ScriptedEngine(c)) for c in ([spoken], chunks))

    for channel in ("reasoning", "answer"):
        assert text(one, channel) == text(many, channel)
    calls = [[event for event in events if isinstance(event, Called)] for events in (one, many)]
    assert calls[0] == calls[1]
    assert end(one).finish == end(many).finish
    answers = [e for e in one if not isinstance(e, Said) or e.channel == "answer"]
    assert "STOP" not in "".join(e.text if isinstance(e, Said) else "|" for e in answers)


@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    st.integers(0, 20),
)
def test_stops_do_not_depend_on_chunks(spoken: str, stops: list[str], cut: int) -> None:
    def heard(chunks: list[str]) -> str:
        strings = StopStrings(tuple(stops))
        said = ""
        for chunk in chunks:
            said += strings.feed(chunk)
            if strings.is_met:
                return said
        return said + strings.finish()

    whole = heard([spoken])
    assert heard([spoken[:cut], spoken[cut:]]) == heard(list(spoken)) == whole
    assert not any(stop in whole for stop in stops)
