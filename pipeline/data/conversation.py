"""What a source's record is: a conversation, a pair of answers, or a text; each knows its place."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chat import Message, check_message, prepare_message
from pipeline.data.strict_json import parse_json
from pipeline.errors import DataError

_MAX_CHARACTERS = 300


@dataclass(frozen=True)
class Record:
    """A JSON-like value as a file has it, and the line it begins on (or its row, in Parquet)."""

    value: Any
    path: Path
    line: int


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's shape and tools, as the file gives them.

    An assistant message with `"train": false` or `"weight": 0` is context only.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    path: Path
    line: int


@dataclass(frozen=True)
class Pair:
    """A preferred and a refused continuation of the same messages."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    path: Path
    line: int


@dataclass(frozen=True)
class Document:
    """Plain text, to be learnt as it stands."""

    text: str
    path: Path
    line: int


Sample = Conversation | Pair | Document


def source_of(sample: Record | Sample) -> str:
    """`path:line`, in characters that can be written whatever the file is called."""
    path = str(sample.path).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return f"{path}:{sample.line}"


def fault_of(record: Record, what: DataError | str) -> DataError:
    """One line, at the record's place, without more of the user's text than a reader wants."""
    sentence = " ".join(str(what).split())
    if len(sentence) > _MAX_CHARACTERS:
        half = _MAX_CHARACTERS // 2
        sentence = f"{sentence[:half]} … {sentence[-half:]}"
    return DataError.at(record.path, record.line, sentence)


def check_messages(messages: Any) -> tuple[Message, ...]:
    """Messages a template can be given; raises DataError naming the one that is at fault."""
    if not isinstance(messages, list) or not messages:
        raise DataError("messages must be a list with at least one message")
    for index, message in enumerate(messages):
        _check_message(index, message)
    return tuple(messages)


def check_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Tool schemas, given as a list or as the JSON text of one; raises DataError."""
    if isinstance(tools, str):  # how data sets with unlike schemas keep Arrow from mixing them
        with suppress(DataError):
            tools = parse_json(tools or "[]")
    if not isinstance(tools or [], list) or not all(isinstance(tool, dict) for tool in tools or ()):
        raise DataError("tools must be a list of JSON objects")
    return tuple(tools or ())


def is_trained(message: Message) -> bool:
    """Whether an assistant message may be learnt from."""
    return message.get("train") is not False and message.get("weight") != 0


def _are_arguments(arguments: Any) -> bool:
    """Whether call arguments are an object, or the text of one, or left out."""
    if isinstance(arguments, str) and arguments:
        try:
            return isinstance(parse_json(arguments), dict)
        except DataError:
            return False
    return arguments is None or arguments == "" or isinstance(arguments, dict)


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


def _check_flags(index: int, message: Message) -> None:
    if not isinstance(message.get("train"), bool | None):
        raise DataError(f"message {index}: train must be true or false")
    if message.get("weight") not in (None, 0, 1):
        raise DataError(f"message {index}: weight must be 0 or 1")


def _check_message(index: int, message: Any) -> None:
    if not isinstance(message, dict):
        raise DataError(f"message {index} is not a JSON object")
    check_message(index, message)
    calls = _check_calls(index, message)
    _check_flags(index, message)
    if message["role"] != "assistant":
        if message.get("train") is True:
            raise DataError(f"message {index}: only assistant turns can be trained")
        return
    prepared = prepare_message(message)
    content = prepared["content"].strip()
    if content.startswith("<think>") and not prepared["reasoning_content"]:
        raise DataError(f"message {index}: its <think> is never closed; the answer was cut there")
    if not calls and not content:
        raise DataError(f"message {index}: an assistant turn with neither text nor tool calls")
