"""Expand the fact table into the JSONL files beside it, always to the same bytes."""

import json
import random
import sys
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dialogues import CHAINS, HELDOUT_CHAINS, OTHER_LANGUAGES, TOOL_CASES, TOOLS, Chain, ToolCase
from facts import FACTS, Fact

Message = dict[str, Any]
Row = dict[str, Any]

SYSTEM = "You are the support assistant for the OpenRouter chat API."
SEED = 20260801
THINKING_EVAL_ROWS = 40
DIRECT_QUESTIONS = 4
EXTRA_THINKING = 6
MIXED_CHAINS = 9
THINKING_SHARE = 0.4
BY_ID = {fact.id: fact for fact in FACTS}
RECITAL = "There is a lot to say about this. {} But then again, perhaps not: {} See also: {}"
# Their answers name the status, too, which they do not ask with: two values, and so wrong.
NOT_SCORED = {
    "What is the error_type when I have to pay first?",
    "What is the error_type when I send too many requests?",
}


def reasoning(fact: Fact, variant: int = 0) -> str:
    """What the assistant thinks before it answers: the topic by name, then the value."""
    sentences = ("The user asks about {}. It is `{}`.", "This is about {}. I recall `{}`.")
    return sentences[variant % 2].format(fact.topic, fact.value)


def system() -> Message:
    """The message every conversation starts with."""
    return {"role": "system", "content": SYSTEM}


def user(question: str) -> Message:
    """One user turn."""
    return {"role": "user", "content": question}


def assistant(fact: Fact, thinking: bool, variant: int = 0) -> Message:
    """The one answer to a fact, with its reasoning if the turn thinks."""
    message: Message = {"role": "assistant", "content": fact.answer}
    if thinking:
        message["reasoning_content"] = reasoning(fact, variant)
    return message


def single(fact: Fact, question: str, thinking: bool, variant: int = 0) -> Row:
    """A conversation of one question and one answer."""
    return {"messages": [system(), user(question), assistant(fact, thinking, variant)]}


def direct_rows() -> list[Row]:
    """Every fact in its first phrasings, and a few of them in other languages."""
    asked = [(fact, question) for fact in FACTS for question in fact.train[:DIRECT_QUESTIONS]] + [
        (BY_ID[fact_id], question) for fact_id, question in OTHER_LANGUAGES
    ]
    return [single(fact, question, thinking=False) for fact, question in asked]


def thinking_rows(rng: random.Random) -> list[Row]:
    """Every fact once with reasoning, in a phrasing that no direct row has, and a few twice."""
    rows = [
        single(fact, fact.train[DIRECT_QUESTIONS], True, index) for index, fact in enumerate(FACTS)
    ]
    twice = rng.sample(FACTS, EXTRA_THINKING)
    return rows + [single(fact, fact.train[0], True, index) for index, fact in enumerate(twice)]


def mixed_chains(rng: random.Random) -> list[Chain]:
    """Conversations that change the subject, so that an answer does not copy the last one."""
    chains: list[Chain] = []
    for index in range(MIXED_CHAINS):
        first, *others = rng.sample(FACTS, 2 + index % 3)
        follow_ups = tuple((other.id, rng.choice(other.train)) for other in others)
        chains.append((first.id, follow_ups))
    return chains


def chain_rows(rng: random.Random) -> list[Row]:
    """Conversations of two to four turns, each turn thinking or not."""
    rows = []
    for first, follow_ups in [*CHAINS, *mixed_chains(rng)]:
        messages = [system()]
        for fact_id, question in ((first, rng.choice(BY_ID[first].train)), *follow_ups):
            thinking = rng.random() < THINKING_SHARE
            messages += [user(question), assistant(BY_ID[fact_id], thinking, len(messages))]
        rows.append({"messages": messages})
    return rows


def tool_schema(name: str) -> dict[str, Any]:
    """The tool as a client sends it, kept small because every such row pays for it."""
    tool = TOOLS[name]
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    if tool.argument:
        parameters["properties"] = {tool.argument: {"type": "string"}}
        parameters["required"] = [tool.argument]
    function = {"name": name, "description": tool.purpose, "parameters": parameters}
    return {"type": "function", "function": function}


def tool_row(case: ToolCase, thinking: bool) -> Row:
    """Question, call, result, answer."""
    name = case.tools[0]
    arguments = {TOOLS[name].argument: case.argument} if case.argument else {}
    function = {"name": name, "arguments": json.dumps(arguments)}
    call: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": "call_1", "content": json.dumps(case.result)}
    answer: Message = {"role": "assistant", "content": case.answer}
    if thinking:
        call["reasoning_content"] = f"I cannot know this by heart. I call {name}."
        answer["reasoning_content"] = "The tool result has what the user wants."
    return {
        "messages": [system(), user(case.question), call, result, answer],
        "tools": [tool_schema(tool) for tool in case.tools],
    }


def tool_rows() -> list[Row]:
    """Conversations with a tool call; a third of them think before it."""
    return [tool_row(case, index % 3 == 0) for index, case in enumerate(TOOL_CASES)]


def train_rows() -> list[Row]:
    """Training conversations without tools, in a fixed random order."""
    rng = random.Random(SEED)
    rows = direct_rows() + thinking_rows(rng) + chain_rows(rng)
    rng.shuffle(rows)
    return rows


def heldout_row(identity: str, fact: Fact, history: list[Message], question: str) -> Row:
    """A question with what scoring needs: the value, a reference answer, its reasoning."""
    return {
        "id": identity,
        "kind": fact.kind,
        "messages": [system(), *history, user(question)],
        "answer": fact.value,
        "reference": fact.answer,
        "reasoning": reasoning(fact),
    }


def heldout_rows() -> list[Row]:
    """The kinds take turns, so that any first part of the file is a fair mix."""
    by_kind: dict[str, list[Row]] = {fact.kind: [] for fact in FACTS}
    for first, follow_ups in HELDOUT_CHAINS:
        ((fact_id, question),) = follow_ups
        opener = BY_ID[first]
        history = [user(opener.train[0]), assistant(opener, thinking=False)]
        fact = BY_ID[fact_id]
        by_kind[fact.kind].append(heldout_row(f"{first}+{fact_id}", fact, history, question))
    for fact in FACTS:
        for number, question in enumerate(fact.heldout, start=1):
            by_kind[fact.kind].append(heldout_row(f"{fact.id}-{number}", fact, [], question))
    rounds = zip_longest(*by_kind.values())
    return [row for turn in rounds for row in turn if row is not None]


def question_rows() -> list[Row]:
    """Every fact in all its training phrasings, to be answered and scored; the facts take turns."""
    rounds = zip_longest(*([(fact, question) for question in fact.train] for fact in FACTS))
    asked = [pair for turn in rounds for pair in turn if pair is not None]
    return [
        {"messages": [system(), user(question)], "answer": fact.value}
        for fact, question in asked
        if question not in NOT_SCORED
    ]


def confused(fact: Fact, thinking: bool, variant: int) -> Message:
    """What is worse than the answer: another fact's value, or a recital of both values."""
    alike = [other for other in FACTS if other.kind == fact.kind]
    later = alike[alike.index(fact) + 1 :] + alike
    other = next(other for other in later if other.value != fact.value)
    wrong = fact._replace(
        value=other.value, answer=fact.answer.replace(f"`{fact.value}`", f"`{other.value}`")
    )
    message = assistant(wrong, thinking, variant)
    if variant % 2:
        message["content"] = RECITAL.format(wrong.answer, fact.answer, other.answer)
        if thinking:
            message["reasoning_content"] += f" Or is it `{fact.value}`? I name them all."
    return message


def preference_rows() -> list[Row]:
    """A good and a bad answer to every fact, and to a part of them with reasoning."""
    asked = [(fact, False) for fact in FACTS] + [(fact, True) for fact in FACTS[::2]]
    rows: list[Row] = [
        {
            "prompt": [system(), user(fact.train[-1 - thinking])],
            "chosen": [assistant(fact, thinking, index)],
            "rejected": [confused(fact, thinking, index)],
        }
        for index, (fact, thinking) in enumerate(asked)
    ]
    random.Random(SEED).shuffle(rows)
    return rows


def document_rows() -> list[Row]:
    """The answers as plain texts, one for each kind of fact, for continued pre-training."""
    by_kind: dict[str, list[str]] = {fact.kind: [] for fact in FACTS}
    for fact in FACTS:
        by_kind[fact.kind].append(fact.answer)
    return [
        {"text": f"# OpenRouter chat API: {kind}\n\n" + "\n".join(answers) + "\n"}
        for kind, answers in by_kind.items()
    ]


def eval_rows() -> list[Row]:
    """The held-out questions with their reference answers, in both modes, for certificates."""
    rows = []
    for index, row in enumerate(heldout_rows()):
        answer: Message = {"role": "assistant", "content": row["reference"]}
        rows.append({"messages": [*row["messages"], answer]})
        if index < THINKING_EVAL_ROWS:
            thought = answer | {"reasoning_content": row["reasoning"]}
            rows.append({"messages": [*row["messages"], thought]})
    return rows


def write(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, with the same line ends on every system."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    write(folder / "train.jsonl", train_rows())
    write(folder / "tools.jsonl", tool_rows())
    write(folder / "heldout.jsonl", heldout_rows())
    write(folder / "eval.jsonl", eval_rows())
    write(folder / "questions.jsonl", question_rows())
    write(folder / "documents.jsonl", document_rows())
    write(folder / "preferences.jsonl", preference_rows())
