"""The content log as conversations to learn from: sound answers only, each of them once."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.chat import Message, prepare_message, without_reasoning
from pipeline.data.conversation import Record
from pipeline.data.formats import parse
from pipeline.errors import DataError
from pipeline.serve.asking.draft import under_its_name
from pipeline.serve.content.entry import Line

_REFUSALS = ("content_filter", "refusal")
# What a redaction can make of an entry, beside what is no conversation.
_UNFIT = (DataError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Lesson:
    """A conversation that ends with an answer of ours."""

    messages: list[Message]
    tools: list[Any]
    marks: list[bytes]
    """Of each beginning, through that message: what was thought in it makes no difference."""

    @property
    def answer(self) -> Message:
        """The last message."""
        return self.messages[-1]


@dataclass
class Findings:
    """What a log comes to."""

    conversations: list[Line] = field(default_factory=list)
    """As `pipeline data` reads them."""
    num_answers: int = 0
    """To be learnt in them."""
    left_out: Counter[str] = field(default_factory=Counter)


def find_lessons(lines: Iterable[Line]) -> Findings:
    """Of conversations that grew turn by turn the longest: it has the others' answers in it.

    Clients seldom send back what was thought, so that comes from the entry of each answer. What an
    assistant says in them and no entry has, such as an example or a reply that was cut off, is
    context, and so is an answer that another conversation has already.
    """
    findings = Findings()
    lessons = list(_sound(lines, findings.left_out))
    answers: dict[bytes, Message] = {}
    for lesson in lessons:
        answers.setdefault(lesson.marks[-1], lesson.answer)
    gone_on = {mark for lesson in lessons for _, mark in _earlier(lesson)}
    taught: set[bytes] = set()
    for lesson in lessons:
        mark = lesson.marks[-1]
        if mark in gone_on and answers[mark] is lesson.answer:  # and no other thought's
            findings.left_out["gone on with"] += 1
            continue
        messages = list(lesson.messages)
        for index, mark in _earlier(lesson):
            messages[index] = dict(answers.get(mark, messages[index]))
            if mark not in answers or mark in taught:
                messages[index]["train"] = False
            else:
                taught.add(mark)
        tools = {"tools": lesson.tools} if lesson.tools else {}
        findings.conversations.append({"messages": messages, **tools})
    findings.num_answers = len(findings.conversations) + len(taught)
    return findings


def _sound(lines: Iterable[Line], left_out: Counter[str]) -> Iterator[Lesson]:
    seen: set[tuple[bytes, str]] = set()
    for line in lines:
        for choice in line.get("choices") or ():
            try:
                fault = _fault(line, choice)
                lesson = None if fault else _lesson(line, choice)
            except _UNFIT:
                fault, lesson = "unfit", None
            if lesson is None:
                left_out[str(fault)] += 1
                continue
            same = lesson.marks[-1], lesson.answer.get("reasoning_content", "")
            if same in seen:
                left_out["the same again"] += 1
                continue
            seen.add(same)
            yield lesson


def _fault(line: Line, choice: Line) -> str | None:
    """Why nobody should learn to answer so."""
    finish = choice["finish_reason"]
    if line.get("error"):
        return "failed"
    if line.get("cancelled") or finish is None:
        return "cancelled"
    if finish in _REFUSALS or choice.get("native_finish_reason") in _REFUSALS:
        return "refused"
    if finish == "length" or choice.get("stop"):
        return "cut off"
    return None if "messages" in line else "no dialogue"


def _lesson(line: Line, choice: Line) -> Lesson:
    """DataError for what `pipeline data` would refuse."""
    messages = [_plain(under_its_name(message)) for message in line["messages"]]
    said = {name: choice.get(name) for name in ("content", "reasoning", "tool_calls")}
    answer = _plain({"role": "assistant", **said})
    if messages[-1]["role"] == "assistant":  # what the model was to go on with
        begun = messages.pop()
        answer = begun | answer | {"content": begun["content"] + answer["content"]}
    messages.append(answer)
    may_call = (line.get("settings") or {}).get("tool_choice") != "none"
    tools = line.get("tools") or [] if may_call else []
    parse(Record({"messages": messages, "tools": tools}, Path("log"), 1), "messages")
    if all(message["role"] != "user" for message in messages):
        raise DataError("nobody asked")
    return Lesson(messages, tools, _marks(messages, tools))


def _plain(message: Message) -> Message:
    """As any client could have sent it: names of calls, hints for a cache and the like are gone."""
    plain = prepare_message(message)
    if not plain.get("reasoning_content"):
        plain.pop("reasoning_content", None)
    if "tool_calls" in plain:  # arguments as they were written, to the digit
        functions = [call.get("function", call) for call in message["tool_calls"]]
        plain["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": each["name"], "arguments": each.get("arguments")},
            }
            for each in functions
        ]
    return plain


def _marks(messages: Sequence[Message], tools: Sequence[Any]) -> list[bytes]:
    digest = hashlib.sha256(json.dumps(tools, sort_keys=True).encode())
    marks = []
    for message in messages:
        same = without_reasoning(prepare_message(message))
        same["content"] = same["content"].strip()
        digest.update(json.dumps(same, sort_keys=True).encode())
        marks.append(digest.digest())
    return marks


def _earlier(lesson: Lesson) -> Iterator[tuple[int, bytes]]:
    """Where an assistant speaks before the answer, and the marks of that."""
    for index, message in enumerate(lesson.messages[:-1]):
        if message["role"] == "assistant":
            yield index, lesson.marks[index]
