"""Conversations for the training benchmark: with history, tools and system texts, as teams have."""

import json
import random
from pathlib import Path
from typing import Any

SYSTEM = (
    "You are the assistant of a parcel service. You look things up with your tools before you "
    "answer, you never guess a date, and you name the parcel's number in every answer. Parcels "
    "travel from the depot to a hub, from there to a branch, and then to the door. A parcel that "
    "waits at a branch for more than seven days goes back. Customers may move a delivery once, to "
    "another day of the same week. Be brief and friendly, and answer in the customer's language."
)
_PLACES = ("the depot", "the northern hub", "the southern hub", "the branch in Ulm", "the door")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


def _tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    texts = {key: {"type": "string", "description": what} for key, what in properties.items()}
    parameters = {"type": "object", "properties": texts, "required": list(properties)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    _tool("find_parcel", "Where a parcel is now.", number="The parcel's number."),
    _tool("plan_delivery", "The day a parcel arrives.", number="The parcel's number."),
    _tool(
        "move_delivery",
        "Deliver a parcel on another day of the week.",
        number="The parcel's number.",
        day="The new day, in English.",
    ),
]


def write_support(support: Path, out: Path, number: int) -> None:
    """The support set's last conversations of several turns, with its tools in every one."""
    tools = json.loads((support / "tools.jsonl").read_text("utf-8").splitlines()[0])["tools"]
    lines = [
        line
        for name in ("train.jsonl", "tools.jsonl")
        for line in (support / name).read_text("utf-8").splitlines()
        if line.count('"role": "assistant"') > 1
    ]
    with out.open("w", encoding="utf-8") as file:
        for line in lines[-number:]:
            file.write(json.dumps(json.loads(line) | {"tools": tools}, ensure_ascii=False) + "\n")


def write_tool_chats(out: Path, number: int, seed: int = 0) -> None:
    """Chats of four questions, each answered after a call, under one system text and its tools."""
    drawn = random.Random(seed)
    with out.open("w", encoding="utf-8") as file:
        for _ in range(number):
            messages = [{"role": "system", "content": SYSTEM}]
            parcel = f"P{drawn.randrange(10**6):06}"
            for turn in range(4):
                messages += _exchange(drawn, parcel, turn)
            file.write(json.dumps({"messages": messages, "tools": TOOLS}) + "\n")


def _exchange(drawn: random.Random, parcel: str, turn: int) -> list[dict[str, Any]]:
    place, day = drawn.choice(_PLACES), drawn.choice(_DAYS)
    name, arguments, question, found, answer = (
        ("find_parcel", {}, f"Where is {parcel} now?", {"at": place}, f"{parcel} is at {place}."),
        ("plan_delivery", {}, "When does it come?", {"day": day}, f"{parcel} comes on {day}."),
        (
            "move_delivery",
            {"day": day},
            f"Please make it {day} instead.",
            {"moved": True},
            f"Done: {parcel} now comes on {day}.",
        ),
        ("find_parcel", {}, "And where is it by now?", {"at": place}, f"{parcel} is at {place}."),
    )[turn]
    call = {"name": name, "arguments": json.dumps({"number": parcel} | arguments)}
    thought = f"I look it up with {name}."
    return [
        {"role": "user", "content": question},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": thought,
            "tool_calls": [{"id": f"call_{turn}", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": f"call_{turn}", "content": json.dumps(found)},
        {"role": "assistant", "content": answer, "reasoning_content": "That is what I wanted."},
    ]
