"""Prompts to be answered by the base: a JSONL file, checked whole before anything is asked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chat import Chat, Message, check_message, text_of
from pipeline.errors import DataError
from pipeline.run import hash_value

LABELS = ("kind", "language")


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with a user's message, and what the base is given for it."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    labels: dict[str, Any]
    """Whatever the line has of LABELS; written beside the reply."""
    ids: list[int]
    """Through the generation prompt of thinking mode."""
    path: Path
    line: int

    @property
    def sha256(self) -> str:
        """Of messages and tools, wherever they stand."""
        return hash_value([self.messages, self.tools])

    @property
    def tool_names(self) -> set[str]:
        """What a reply may call."""
        return {_name(tool) for tool in self.tools}


def read_prompts(path: Path, chat: Chat) -> list[Prompt]:
    """Prompts of a JSONL file; raises DataError at the first line that is not one.

    The same prompt twice is refused: it would get the same reply twice.
    """
    try:
        # Not splitlines(): a JSON string may hold other line breaks than \n as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: replay.prompts must be a JSONL file") from error
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        raise DataError(f"{path}: {reason}; replay.prompts must name a JSONL file") from error
    prompts: list[Prompt] = []
    places: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = _parse(line, chat, path, number)
        except DataError as error:
            raise DataError.at(path, number, str(error)) from error
        first = places.setdefault(prompt.sha256, number)
        if first != number:
            raise DataError.at(path, number, f"the prompt of line {first} once more; remove one")
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    return prompts


def _parse(line: str, chat: Chat, path: Path, number: int) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError("not JSON") from error
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    messages, tools = _check_messages(row.get("messages")), _check_tools(row.get("tools"))
    try:
        ids = chat.prompt_ids(messages, tools, "thinking")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError("the base's template cannot express these messages") from error
    labels = {label: row[label] for label in LABELS if label in row}
    return Prompt(tuple(messages), tuple(tools), labels, ids, path, number)


def _check_messages(messages: Any) -> Sequence[Message]:
    if not isinstance(messages, list) or not messages:
        raise DataError("a prompt needs `messages`, a list with at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"message {index} is not a JSON object")
        check_message(index, message)
    last = messages[-1]
    if last["role"] != "user" or not text_of(last.get("content")).strip():
        raise DataError("the last message must be the user's, with text: the base answers it")
    return messages


def _check_tools(tools: Any) -> Sequence[dict[str, Any]]:
    listed = [] if tools is None else tools
    if not isinstance(listed, list) or not all(isinstance(t, dict) and _name(t) for t in listed):
        raise DataError("tools must be a list of functions, each with a name")
    return listed


def _name(tool: dict[str, Any]) -> str:
    """A tool's name, in OpenAI's shape or as the function alone; "" if it has none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""
