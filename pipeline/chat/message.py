"""Messages as clients and files write them, and as the template needs them."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pipeline.errors import DataError

Mode = Literal["thinking", "direct"]
Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
# How reasoning stands in a reply that was stored as it came from the model.
_INLINE = re.compile(r"\s*<think>(?P<reasoning>.*?)</think>\n*(?P<answer>.*)", re.S)


def check_message(index: int, message: Message) -> None:
    """Raise DataError for a role the template does not know, or content that is not text."""
    role = message.get("role")
    if role not in (*ROLES, "developer"):
        raise DataError(f"message {index}: role {role!r} is none of {', '.join(ROLES)}")
    try:
        text_of(message.get("content"))
    except DataError as error:
        raise DataError(f"message {index}: {error}") from error


def prepare_message(message: Message) -> Message:
    """An OpenAI-shaped message as the template needs it; a prepared one stays as it is.

    Content parts are joined and null becomes empty (the template would render both as nothing,
    silently); a think block at the beginning of the content becomes reasoning; reasoning is always
    a string, so the template never cuts the answer at a literal `</think>`; call arguments are
    objects wherever they parse, so one call has one spelling.
    """
    role = "system" if message["role"] == "developer" else message["role"]
    prepared: Message = {"role": role, "content": text_of(message.get("content"))}
    if role != "assistant":
        return prepared
    reasoning = reasoning_of(message)
    # Blank reasoning is none: the template would write it into the block of a direct turn.
    while not reasoning.strip() and (block := _INLINE.match(prepared["content"])):
        reasoning, prepared["content"] = block["reasoning"], block["answer"]
    prepared["reasoning_content"] = reasoning if reasoning.strip() else ""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    if calls:
        prepared["tool_calls"] = [
            {"function": {"name": call["name"], "arguments": _arguments(call.get("arguments"))}}
            for call in calls
        ]
    return prepared


def text_of(content: Any) -> str:
    """A message's content as one string; raises DataError for a part that is not text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"content must be text, not {type(content).__name__}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"content part {kind!r} is not text")
        if not isinstance(part.get("text") or "", str):
            raise DataError(
                f"a content part's text must be text, not {type(part['text']).__name__}"
            )
    return "".join(part.get("text") or "" for part in content)


def reasoning_of(message: Message) -> str:
    """An assistant message's reasoning: the first of the known fields that has any, or ""."""
    details = message.get("reasoning_details")
    texts = [
        item["text"]
        for item in (details if isinstance(details, list) else ())
        if isinstance(item, dict)
        and item.get("type") == "reasoning.text"
        and isinstance(item.get("text"), str)
    ]
    named = ("".join(texts), message.get("reasoning"), message.get("reasoning_content"))
    return next((text for text in named if isinstance(text, str) and text.strip()), "")


def without_reasoning(message: Message) -> Message:
    """A prepared message as if nobody had thought."""
    while message.get("reasoning_content"):  # a block may stand in the content, too
        message = prepare_message(message | {"reasoning_content": ""})
    return message


def prepare_tools(tools: Sequence[Any]) -> list[Any]:
    """Tools as the template needs them: without the marks that clients leave for a cache."""
    return [
        {key: value for key, value in tool.items() if key != "cache_control"}
        if isinstance(tool, Mapping)
        else tool
        for tool in tools
    ]


def _arguments(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except ValueError:
            return arguments
        return parsed if isinstance(parsed, dict) else arguments
    return {} if arguments is None else arguments
