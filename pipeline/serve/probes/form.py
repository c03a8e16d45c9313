"""The form that an answer is held to."""

import json
from typing import Any

from pipeline.serve.probes.client import Body
from pipeline.serve.probes.reply import Reply
from pipeline.serve.probes.seen import Fault, Seen, not_shown, passed, quoted
from pipeline.serve.probes.subject import Subject

_ASKED = [{"role": "user", "content": "Describe the sea as JSON: its colour, and is it deep?"}]
_COLOURS = ["blue", "grey"]
_SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"type": "string", "enum": _COLOURS},
        "is_deep": {"type": "boolean"},
    },
    "required": ["colour", "is_deep"],
    "additionalProperties": False,
}
_MAX_TOKENS = 256


async def json_object(subject: Subject) -> Seen:
    """Any object."""
    reply = await subject.ask(
        messages=_ASKED, max_tokens=_MAX_TOKENS, response_format={"type": "json_object"}
    )
    return _see(reply, reply.first.text)


async def json_schema(subject: Subject) -> Seen:
    """The object of a schema."""
    reply = await subject.ask(messages=_ASKED, max_tokens=_MAX_TOKENS, response_format=_form())
    return _see(reply, reply.first.text, is_by_schema=True)


async def json_schema_in_stream(subject: Subject) -> Seen:
    """The same in bits."""
    stream = await subject.ask_stream(
        messages=_ASKED, max_tokens=_MAX_TOKENS, response_format=_form()
    )
    reply = stream.reply()
    return _see(reply, reply.first.text, is_by_schema=True)


def _form() -> Body:
    schema = {"name": "sea", "strict": True, "schema": _SCHEMA}
    return {"type": "json_schema", "json_schema": schema}


def _see(reply: Reply, text: str, is_by_schema: bool = False) -> Seen:
    if reply.first.finish == "length":
        return not_shown(f"cut after {reply.num_tokens} tokens: {quoted(text)}")
    try:
        value: Any = json.loads(text)
    except ValueError as error:
        raise Fault(f"it is no JSON: {quoted(text)}") from error
    if not isinstance(value, dict):
        raise Fault(f"it is no object: {quoted(text)}")
    if is_by_schema and not _is_by_schema(value):
        raise Fault(f"it is not by the schema: {quoted(text)}")
    return passed(quoted(text))


def _is_by_schema(value: Body) -> bool:
    has_types = value.get("colour") in _COLOURS and isinstance(value.get("is_deep"), bool)
    return has_types and len(value) == 2
