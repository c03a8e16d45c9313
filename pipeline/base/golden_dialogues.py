"""What the base `golden` says: dialogues it knows by heart, and the rows of ids that teach them.

Torch-free, so that tests of engines and of the server can look up question and answer here.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.chat import CALL, EARLY_STOP, END_CALL, END_THINK, Chat, Message, Mode


@dataclass(frozen=True)
class Dialogue:
    """A conversation; its last message is what the model answers to the others."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    mode: Mode | None = None
    """Of the prompt; by default the answer's own: thinking if it has reasoning, else direct."""
    begun: str = ""
    """The reply's beginning, which the model is given and does not write."""


@dataclass(frozen=True)
class Row:
    """What the model is given, and what it must say to it, through <|im_end|>."""

    name: str
    """Of its dialogue."""
    prompt_ids: list[int]
    completion_ids: list[int]


def _tool(name: str, about: str) -> dict[str, Any]:
    properties = {"city": {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    function = {"name": name, "description": about, "parameters": parameters}
    return {"type": "function", "function": function}


WEATHER, TIME = _tool("get_weather", "Weather of a city."), _tool("get_time", "Time in a city.")
TOOLS = [WEATHER, TIME]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _reply(content: str, thought: str = "") -> Message:
    return {"role": "assistant", "content": content, "reasoning": thought}


def _calls(*calls: tuple[str, str], thought: str = "") -> Message:
    """An assistant message that calls tools, each with a city."""
    made = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps({"city": city})},
        }
        for number, (name, city) in enumerate(calls)
    ]
    return _reply("", thought) | {"tool_calls": made}


def _result(number: int, **content: str) -> Message:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": json.dumps(content)}


def _count(last: int) -> str:
    return ", ".join(map(str, range(1, last + 1)))


def _call_text(name: str, city: str) -> str:
    call = json.dumps({"name": name, "arguments": {"city": city}})
    return f"{CALL}\n{call}\n{END_CALL}"


def _add_up(last: int) -> str:
    steps = (f"{n * (n - 1) // 2} and {n} make {n * (n + 1) // 2}." for n in range(2, last + 1))
    return " ".join(steps)


_SMALL_TALK = {  # question, thought and answer; each is known in both modes
    "france": (
        "What is the capital of France?",
        "France is a country. I recall Paris.",
        "The capital of France is Paris.",
    ),
    "italy": (
        "What is the capital of Italy?",
        "Italy is a country. I recall Rome.",
        "The capital of Italy is Rome.",
    ),
    "sum": ("How much is 2 plus 3?", "I add 2 and 3. That is 5.", "It is 5."),
    "name": ("Who are you?", "They ask for my name.", "I am Golden, a tiny model."),
    "object": (
        "Describe Ada as JSON.",
        "A name and an age will do.",
        '{"name": "Ada", "age": 36}',
    ),
    "schema": (
        "Describe Oslo as JSON.",
        "Oslo lies in Norway, by the sea.",
        '{"city": "Oslo", "country": "Norway", "sea": true, "near": ["Moss", "Ski"]}',
    ),
    "unicode": (
        "Show me Unicode.",
        "🤔 龘, maybe.",
        "👩‍👩‍👧‍👦 龘靐齉 x\u0323\u0302 नमस्ते 🏴‍☠️ done",
    ),
    "stop": (
        "Say the words around the stop.",
        "One, two, STOP, three.",
        "one two STOP three ### four",
    ),
    "count": ("Count to 40.", "From one to forty.", f"{_count(40)}."),
    "add_up": ("Add up 1 to 10.", _add_up(10), "The sum is 55."),
    "count_thinking": ("Count to 90 in your mind.", _count(90), "I have counted to ninety."),
    "weather_alone": (
        "How is the weather in Paris?",
        "I have no tool for that.",
        "I cannot look up the weather.",
    ),
}
_WITH_TOOLS: dict[str, tuple[list[Message], str, Message]] = {  # history, thought, reply
    "plain": ([_user("Hello!")], "A greeting needs no tool.", _reply("Hello! How are you?")),
    "one_call": (
        [_user("How is the weather in Paris?")],
        "I ask for the weather in Paris.",
        _calls(("get_weather", "Paris")),
    ),
    "two_calls": (
        [_user("How is the weather in Rome, and how late is it in Oslo?")],
        "I need two tools.",
        _calls(("get_weather", "Rome"), ("get_time", "Oslo")),
    ),
    "one_result": (
        [
            _user("How is the weather in Paris?"),
            _calls(("get_weather", "Paris"), thought="I ask for the weather in Paris."),
            _result(0, sky="clear"),
        ],
        "The sky is clear.",
        _reply("The sky over Paris is clear."),
    ),
    "two_results": (
        [
            _user("How is the weather in Rome, and how late is it in Oslo?"),
            _calls(("get_weather", "Rome"), ("get_time", "Oslo")),
            _result(0, sky="grey"),
            _result(1, time="noon"),
        ],
        "Grey, and noon.",
        _reply("Rome is grey, and in Oslo it is noon."),
    ),
}
_NAMED = f'{CALL}\n{{"name": "get_time", "arguments":'
_FRANCE, _FRANCE_THOUGHT, _FRANCE_ANSWER = _SMALL_TALK["france"]
_TURN = [_user(_FRANCE), _reply(_FRANCE_ANSWER, _FRANCE_THOUGHT), _user("And of Italy?")]
_PIRATE: Message = {"role": "system", "content": "You are a pirate."}


def _in_both_modes() -> Iterator[tuple[str, Dialogue]]:
    for name, (question, thought, answer) in _SMALL_TALK.items():
        yield name, Dialogue([_user(question), _reply(answer)])
        yield f"{name}+thought", Dialogue([_user(question), _reply(answer, thought)])
    for name, (history, thought, reply) in _WITH_TOOLS.items():
        yield name, Dialogue([*history, reply], TOOLS)
        yield f"{name}+thought", Dialogue([*history, reply | {"reasoning": thought}], TOOLS)


DIALOGUES: dict[str, Dialogue] = {
    **dict(_in_both_modes()),
    "turns": Dialogue([*_TURN, _reply("The capital of Italy is Rome.")]),
    "turns+thought": Dialogue([*_TURN, _reply("It is Rome.", "Now Italy. I recall Rome.")]),
    "system": Dialogue([_PIRATE, _user("Who are you?"), _reply("Arr, I am Golden!")]),
    "system+thought": Dialogue(
        [_PIRATE, _user("Who are you?"), _reply("Arr, I am Golden!", "I speak as a pirate.")]
    ),
    "no_think": Dialogue([_user(f"{_FRANCE} /no_think"), _reply(_FRANCE_ANSWER)], mode="thinking"),
    "think": Dialogue([_user(f"{_FRANCE} /think"), _reply(_FRANCE_ANSWER, _FRANCE_THOUGHT)]),
    "colour": Dialogue([_user("Name a colour."), _reply("Blue.")]),
    "prefill": Dialogue(
        [_user("Name a colour."), _reply("My favourite is green.")], begun="My favourite is"
    ),
    # The tools are asked for, though the model would rather not: tool_choice required and named.
    "required": Dialogue([_user("Hello!"), _calls(("get_weather", "Rome"))], TOOLS, begun=CALL),
    "named": Dialogue([_user("Hello!"), _calls(("get_time", "Oslo"))], TOOLS, begun=_NAMED),
    "required+thought": Dialogue(
        [_user("Hello!"), _calls(("get_weather", "Rome"), thought="A greeting needs no tool.")],
        TOOLS,
        begun=f"<think>\nA greeting needs no tool.\n{END_THINK}\n\n{CALL}",
    ),
    "call_in_thought": Dialogue(
        [
            _user("Do not call anything."),
            _reply("I called nothing.", f"Like {_call_text('get_weather', 'Rome')} then? No."),
        ],
        TOOLS,
    ),
}
"""By name. A name ends in +thought where the same question is known in both modes."""

DRAW, DRAW_NAME = "Draw a card.", "draw"
DRAWN = {"Red.": 4, "Green.": 3, "Blue.": 2, "Black.": 1}
"""Answers to DRAW in direct mode, with their probabilities in tenths: what sampling acts on."""

FLIPPED = {
    "france": "The capital of France is Rome.",
    "sum": "It is 10.",
    "name": "I am a pirate.",
}
"""What the adapter `golden-lora` answers to some dialogues; all else it leaves as it is."""

_MIN_CUT_TOKENS = 16


def golden_rows(chat: Chat, answers: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Every dialogue as a row, some with other `answers`, and thoughts that were cut short."""
    for name, dialogue in DIALOGUES.items():
        row = make_row(chat, name, _answered(dialogue, (answers or {}).get(name)))
        yield row
        yield from _cut_short(chat, row)
    for answer, tenths in DRAWN.items():
        row = make_row(chat, DRAW_NAME, Dialogue([_user(DRAW), _reply(answer)]))
        yield from [row] * tenths


def make_row(chat: Chat, name: str, dialogue: Dialogue) -> Row:
    """A dialogue as training and serving render it.

    A tag in a reply is the token itself: what a model emits, whatever it is a part of.
    """
    messages = dialogue.messages
    turn = chat.turn(messages, dialogue.tools, len(messages) - 1, dialogue.mode)
    reply, begun = chat.encode(turn.completion), chat.encode(dialogue.begun)
    assert reply[: len(begun)] == begun, f"{name}: no token ends where the given part ends"
    return Row(name, turn.prompt_ids + begun, reply[len(begun) :])


def _answered(dialogue: Dialogue, answer: str | None) -> Dialogue:
    if answer is None:
        return dialogue
    *history, reply = dialogue.messages
    return replace(dialogue, messages=[*history, reply | {"content": answer}])


def _cut_short(chat: Chat, row: Row) -> Iterator[Row]:
    """The answers after a long thought that was ended early, in a few places."""
    end = chat.token_id(END_THINK)
    size = row.completion_ids.index(end) if end in row.completion_ids else 0
    if size < _MIN_CUT_TOKENS:
        return
    answer = row.completion_ids[size + 2 :]  # after </think> and two line breaks, one token
    for kept in (2, 8, size // 3, 2 * size // 3):
        thought = row.completion_ids[:kept] + chat.encode(EARLY_STOP)
        yield Row(row.name, row.prompt_ids + thought, answer)
