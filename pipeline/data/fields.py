"""What stands under a record's keys: text, lists, tools and messages, or the fault of it."""

from typing import Any

from pipeline.chat import Message
from pipeline.data.conversation import check_messages, check_tools
from pipeline.data.strict_json import parse_json
from pipeline.errors import DataError


def read_text(fields: dict[str, Any], key: str) -> str:
    """Text that says something; raises DataError naming the key, as all of these do."""
    text = read_optional_text(fields, key)
    if not text.strip():
        raise DataError(f"{key} is blank")
    return text


def read_optional_text(fields: dict[str, Any], key: str) -> str:
    """Text, empty where the key is missing."""
    text = fields.get(key, "")
    if not isinstance(text, str):
        raise DataError(f"{key} must be text, not {type(text).__name__}")
    return text


def read_list(fields: dict[str, Any], key: str) -> list[Any]:
    """A list with at least one item, or the JSON text of one."""
    items = fields[key]
    if isinstance(items, str):
        try:
            items = parse_json(items)
        except DataError as error:
            raise DataError(f"{key} is text, and {error}; write it with json.dumps") from error
    if not isinstance(items, list) or not items:
        raise DataError(f"{key} must be a list with at least one item")
    return items


def read_tools(fields: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Tool schemas as a client sends them: a function's own schema is put into one."""
    tools = fields.get("tools") or fields.get("functions")
    if not tools:
        return ()
    return tuple(map(_wrap_function, check_tools(tools)))


def _wrap_function(schema: dict[str, Any]) -> dict[str, Any]:
    if "function" in schema or "name" not in schema:
        return schema
    bare = {key: value for key, value in schema.items() if key != "type"}
    return {"type": "function", "function": bare}


def read_messages(fields: dict[str, Any], key: str) -> tuple[Message, ...]:
    """Checked messages, with OpenAI's older names for tools in today's."""
    return _check([_modernise(message) for message in read_list(fields, key)], key)


def _check(messages: list[Any], key: str) -> tuple[Message, ...]:
    try:
        return check_messages(messages)
    except DataError as error:
        raise error if key == "messages" else DataError(f"{key}: {error}") from error


def _modernise(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    if message.get("role") == "function":
        return message | {"role": "tool"}
    call = message.get("function_call")
    if call is None or message.get("tool_calls"):
        return message
    return message | {"tool_calls": [{"type": "function", "function": call}]}


def read_turns(fields: dict[str, Any], key: str, role: str) -> tuple[Message, ...]:
    """Messages, or text as one message of that role."""
    value = fields[key]
    if isinstance(value, list) or (isinstance(value, str) and _is_messages(value)):
        return read_messages(fields, key)
    return _check([{"role": role, "content": read_text(fields, key)}], key)


def _is_messages(text: str) -> bool:
    """Whether a text is the JSON text of messages, and so not what somebody said."""
    if not text.lstrip().startswith("["):
        return False
    try:
        items = parse_json(text)
    except DataError:
        return False
    return bool(items) and all(isinstance(item, dict) and "role" in item for item in items)
