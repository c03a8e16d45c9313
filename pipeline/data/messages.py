"""JSONL in OpenAI's `messages` shape to checked conversations, each knowing its file and line."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chat import Message, check_message, text_of
from pipeline.errors import DataError


@dataclass(frozen=True)
class Conversation:
    """Messages and tools as the file gives them, and where they stand."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    path: Path
    line: int

    @property
    def source(self) -> str:
        """`path:line`."""
        return f"{self.path}:{self.line}"


def read_conversations(path: Path) -> Iterator[Conversation | DataError]:
    """Each line's conversation, or the DataError that says what is wrong with it.

    Faults of a line are given, not raised, so that the caller decides between refusing and
    dropping. A file that is missing, empty or not UTF-8 is raised.
    """
    line = 0
    try:
        with path.open("rb") as file:  # decoded line by line, so that a fault's line is known
            for line, raw in enumerate(file, start=1):
                text = raw.decode("utf-8")
                if text.strip():
                    yield _parse(path, line, text)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; data.sources paths start at {Path.cwd()}") from error
    except UnicodeDecodeError as error:
        raise DataError.at(path, line, f"not UTF-8 text ({error.reason}); save it so") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if line == 0:
        raise DataError(f"{path} is empty: it needs one conversation a line")


def _parse(path: Path, line: int, text: str) -> Conversation | DataError:
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        return DataError.at(path, line, f"{half} is half a character; a text was cut there")
    except json.JSONDecodeError as error:
        return DataError.at(path, line, f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return DataError.at(path, line, f"not JSON: {error}")
    try:
        messages, tools = _check_row(row)
    except DataError as error:
        return DataError.at(path, line, str(error))
    return Conversation(messages, tools, path, line)


def _check_row(row: Any) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise DataError('a conversation must look like {"messages": [...]}')
    messages = row["messages"]
    for index, message in enumerate(messages):
        _check_message(index, message)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("there is no assistant turn to learn from")
    tools = row.get("tools") or []
    if isinstance(tools, str):  # how data sets with unlike schemas keep Arrow from mixing them
        with suppress(ValueError):
            tools = json.loads(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("tools must be a list of JSON objects")
    return tuple(messages), tuple(tools)


def _are_arguments(arguments: Any) -> bool:
    """Whether call arguments are an object, or the text of one, or left out."""
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return False
    return not arguments or isinstance(arguments, dict)


def _check_calls(index: int, message: Message) -> list[Any]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise DataError(f"message {index}: tool_calls must be a list")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"message {index}: a tool call has no function name")
        if not _are_arguments(function.get("arguments")):
            raise DataError(f"message {index}: a tool call's arguments are not a JSON object")
    return calls


def _check_message(index: int, message: Any) -> None:
    if not isinstance(message, dict):
        raise DataError(f"message {index} is not a JSON object")
    check_message(index, message)
    calls = _check_calls(index, message)
    if message["role"] == "assistant" and not calls and not text_of(message.get("content")).strip():
        raise DataError(f"message {index}: an assistant turn with neither text nor tool calls")
