"""Calls of tools."""

import json
from typing import Any

from pipeline.serve.probes.client import Body
from pipeline.serve.probes.reply import Reply
from pipeline.serve.probes.seen import Fault, Seen, not_shown, passed, quoted
from pipeline.serve.probes.subject import Subject

_ASKED = [{"role": "user", "content": "How is the weather in Paris, and in Rome?"}]
_CITIES = ["Paris", "Rome"]
_MAX_TOKENS = 256


def _tool(name: str) -> Body:
    """One that takes a city, of two."""
    properties = {"city": {"type": "string", "enum": _CITIES}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    function = {"name": name, "description": f"{name} of a city", "parameters": parameters}
    return {"type": "function", "function": function}


_TOOLS = [_tool("get_weather"), _tool("get_time")]


async def tools(subject: Subject) -> Seen:
    """A model calls if it likes; a call must be one of those that there are."""
    reply = await _ask(subject)
    if not reply.first.calls:
        return not_shown(f"accepted; it says {quoted(reply.first.text)}")
    return _see(reply)


async def required(subject: Subject) -> Seen:
    """tool_choice required."""
    return _see(await _ask(subject, tool_choice="required"))


async def named(subject: Subject) -> Seen:
    """tool_choice of one function."""
    choice = {"type": "function", "function": {"name": "get_time"}}
    reply = await _ask(subject, tool_choice=choice)
    if others := {name for name, _ in reply.first.calls} - {"get_time"}:
        raise Fault(f"get_time was asked for, {', '.join(others)} called")
    return _see(reply)


async def none(subject: Subject) -> Seen:
    """tool_choice none."""
    reply = await _ask(subject, tool_choice="none")
    if reply.first.calls:
        raise Fault(f"it calls {reply.first.calls[0][0]}")
    return passed(f"it says {quoted(reply.first.text)}")


async def in_stream(subject: Subject) -> Seen:
    """tool_choice required, in bits."""
    stream = await subject.ask_stream(
        messages=_ASKED, tools=_TOOLS, tool_choice="required", max_tokens=_MAX_TOKENS
    )
    return _see(stream.reply())


async def not_parallel(subject: Subject) -> Seen:
    """parallel_tool_calls false."""
    choice = {"tool_choice": "required"} if subject.has("tool_choice") else {}
    reply = await _ask(subject, parallel_tool_calls=False, **choice)
    if not reply.first.calls:
        return not_shown(f"it says {quoted(reply.first.text)}")
    if len(reply.first.calls) > 1:
        raise Fault(f"one call was allowed, {len(reply.first.calls)} came")
    return _see(reply)


async def _ask(subject: Subject, **fields: Any) -> Reply:
    return await subject.ask(messages=_ASKED, tools=_TOOLS, max_tokens=_MAX_TOKENS, **fields)


def _see(reply: Reply) -> Seen:
    """Calls that must be there, each of a tool that was given, with what it takes."""
    choice = reply.first
    if choice.finish == "length":
        return not_shown(f"cut after {reply.num_tokens} tokens")
    if not choice.calls:
        raise Fault(f"it calls nothing, and says {quoted(choice.text)}")
    for name, arguments in choice.calls:
        if name not in ("get_weather", "get_time"):
            raise Fault(f"it calls {name!r}, which there is not")
        try:
            city = json.loads(arguments)["city"]
        except (ValueError, LookupError, TypeError) as error:
            raise Fault(f"{name} is called with {quoted(arguments)}") from error
        if city not in _CITIES:
            raise Fault(f"{name} is called with {quoted(arguments)}")
    if choice.finish != "tool_calls":
        raise Fault(f"it calls, and finish_reason is {choice.finish!r}")
    name, arguments = choice.calls[0]
    return passed(f"{len(choice.calls)} calls: {name}({arguments})")
