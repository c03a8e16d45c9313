"""Prompts to be answered by the base: read as the data stage reads, all before any is asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chat import Chat, Message, text_of
from pipeline.data.conversation import Record, fault_of
from pipeline.data.fields import read_messages, read_tools
from pipeline.data.files import read_records
from pipeline.errors import DataError
from pipeline.run import hash_value

LABELS = ("kind", "language")


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with a user's message, and what the base is given for it."""

    messages: tuple[Message, ...]
    """As the data stage has them, and so are the tools: what is asked is what is trained."""
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
        functions = (tool.get("function") for tool in self.tools)
        names = (function.get("name") for function in functions if isinstance(function, dict))
        return {name for name in names if isinstance(name, str)}


def read_prompts(path: Path, chat: Chat) -> list[Prompt]:
    """Prompts of a JSONL file; raises DataError at the first line that is not one.

    The same prompt twice is refused: it would get the same reply twice.
    """
    if not path.exists():
        raise DataError(f"{path} is missing; replay.prompts must name a JSONL file")
    prompts: list[Prompt] = []
    places: dict[str, int] = {}
    for record in read_records(path):
        if isinstance(record, DataError):
            raise record
        prompt = _parse(record, chat)
        first = places.setdefault(prompt.sha256, record.line)
        if first != record.line:
            raise DataError.at(
                path, record.line, f"the prompt of line {first} once more; remove one"
            )
        prompts.append(prompt)
    return prompts


def _parse(record: Record, chat: Chat) -> Prompt:
    try:
        fields = _read_fields(record.value)
        messages, tools = read_messages(fields, "messages"), read_tools(fields)
        _check_question(messages[-1])
        ids = chat.prompt_ids(messages, tools, "thinking")
    except DataError as error:
        raise fault_of(record, error) from error
    labels = {label: fields[label] for label in LABELS if label in fields}
    return Prompt(messages, tools, labels, ids, record.path, record.line)


def _read_fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("messages") is None:
        raise DataError('a prompt must be a JSON object such as {"messages": [...]}')
    return value


def _check_question(last: Message) -> None:
    if last["role"] != "user" or not text_of(last.get("content")).strip():
        raise DataError("the last message must be the user's, with text: the base answers it")
