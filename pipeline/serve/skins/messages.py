"""Anthropic's Messages API: its requests in chat/completions' words, its replies in its own."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.errors import RequestError
from pipeline.serve.asking.request import ChatRequest, check_request
from pipeline.serve.schema.messages import PING, MessageWriter, message_error_body
from pipeline.serve.skins.messages_request import (
    Block,
    Message,
    MessagesRequest,
    OtherBlock,
    ResultBlock,
    Text,
    Thinking,
    ToolResult,
    ToolUse,
    unread,
)
from pipeline.serve.skins.skin import Body, Heading
from pipeline.serve.skins.strict import read_as

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_KINDS = {"image": "image_url", "document": "file"}
"""Of other blocks, by chat's names, which its refusal tells."""
_NO_PLACE = ("logprobs", "n", "prompt", "top_logprobs")
"""Fields of chat's that ask for what a reply of this dialect has no place for."""
# Chat's names of what this dialect has words of its own for, and these words.
_OWN_WORDS = {
    "models": "fallbacks",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "reasoning": "thinking and output_config.effort",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
}


class Messages:
    """A Skin. What this dialect has no word for may be said by chat/completions' names.

    Without `thinking` a model does what it does by default, which is Qwen3's thinking, not
    Anthropic's answering at once: clients of this API are made for thinking blocks.
    """

    keep_alive = PING

    def read(self, values: Body) -> ChatRequest:
        """By `check_request`, once it is in its words."""
        try:
            return check_request(_translate(read_as(MessagesRequest, values)))
        except RecursionError as error:
            raise RequestError("the body is nested too deeply") from error

    def writer(self, heading: Heading) -> MessageWriter:
        """For one reply."""
        return MessageWriter(heading)

    def error_body(
        self, error: RequestError, asked_models: Sequence[str], metadata: Body | None = None
    ) -> Body:
        """A failure before anything was sent."""
        return message_error_body(error, asked_models, metadata)


def _translate(asked: MessagesRequest) -> Body:
    """Fields that change nothing keep their own names, as a chat request names them."""
    others = {k: value for k, value in (asked.model_extra or {}).items() if value is not None}
    said = {k: value for k, value in _said(asked) if value is not None}
    for name in _NO_PLACE:
        if name in others:
            raise RequestError(
                f"{name}: a reply of POST /messages has no place for it; ask /chat/completions"
            )
    for name in said:
        if name in others:
            raise RequestError(f"{name}: {_OWN_WORDS[name]} says the same here; send one of them")
    if asked.metadata is not None and asked.metadata.user_id is not None:
        others.setdefault("user", asked.metadata.user_id)
    if others.get("service_tier") == "standard_only":
        others["service_tier"] = "default"
    return {**dict.fromkeys(_unread(asked), True), **others, **said}


def _said(asked: MessagesRequest) -> Iterator[tuple[str, Any]]:
    """What this dialect has words of its own for; None is not said."""
    system = [{"role": "system", "content": _parts(asked.system)}] if asked.system else []
    turns = [turn for message in asked.messages for turn in _turns(message)]
    yield "messages", system + turns
    yield "tools", _tools(asked)
    yield "reasoning", _reasoning(asked)
    yield "stop", asked.stop_sequences
    if choice := asked.tool_choice:
        named = {"type": "function", "function": {"name": choice.name}}
        yield "tool_choice", _CHOICES.get(choice.type, named)
        yield "parallel_tool_calls", False if choice.disable_parallel_tool_use else None
    if asked.output_config and (form := asked.output_config.format):
        schema = {"name": "output", "strict": True, "schema": form.schema_}
        yield "response_format", {"type": "json_schema", "json_schema": schema}
    if asked.fallbacks:
        yield "models", [fallback.model for fallback in asked.fallbacks]


def _turns(message: Message) -> Iterator[Body]:
    """Results of calls are messages of their own, and precede what else the user says.

    One that is a failure begins with that word, as Qwen3's dialogue has no other mark for it.
    """
    results = [block for block in message.content if isinstance(block, ToolResult)]
    for result in results:
        failed = [{"type": "text", "text": "Error: "}] if result.is_error else []
        content = failed + _parts(result.content or ())
        yield {"role": "tool", "tool_call_id": result.tool_use_id, "content": content}
    if len(results) < len(message.content) or not results:
        turn: Body = {"role": message.role, "content": _parts(message.content)}
        thoughts = [block.thinking for block in message.content if isinstance(block, Thinking)]
        calls = [_call(block) for block in message.content if isinstance(block, ToolUse)]
        if thoughts:
            turn["reasoning"] = "".join(thoughts)
        if calls:
            turn["tool_calls"] = calls
        yield turn


def _parts(blocks: Sequence[Block | ResultBlock]) -> list[Body]:
    """Of a message's content; a block that a text model cannot read is left for the refusal."""
    parts: list[Body] = []
    for block in blocks:
        if isinstance(block, Text):
            parts.append({"type": "text", "text": block.text})
        elif isinstance(block, OtherBlock):
            parts.append({"type": _KINDS.get(block.type, block.type)})
    return parts


def _call(block: ToolUse) -> Body:
    arguments = json.dumps(block.input, ensure_ascii=False)
    function = {"name": block.name, "arguments": arguments}
    return {"id": block.id, "type": "function", "function": function}


def _tools(asked: MessagesRequest) -> list[Body] | None:
    if asked.tools is None:
        return None
    tools = []
    for tool in asked.tools:
        function: Body = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        function["parameters"] = tool.input_schema
        if tool.strict is not None:
            function["strict"] = tool.strict
        tools.append({"type": "function", "function": function})
    return tools


def _reasoning(asked: MessagesRequest) -> Body | None:
    """Adaptive is no budget: the model itself ends its thought, as Qwen3 does unless it is told."""
    thinking, effort = asked.thinking, _effort(asked)
    wish: Body = {} if effort is None else {"effort": effort}
    if thinking is None:
        return wish or None
    if thinking.display == "omitted":
        wish["exclude"] = True
    if thinking.type == "disabled":
        return {"enabled": False}
    if thinking.type == "enabled":
        wish["max_tokens"] = thinking.budget_tokens
    return wish


def _effort(asked: MessagesRequest) -> str | None:
    """None where `thinking` says more exactly how long to think."""
    is_exact = asked.thinking is not None and asked.thinking.type != "adaptive"
    return None if is_exact or asked.output_config is None else asked.output_config.effort


def _unread(asked: MessagesRequest) -> Iterator[str]:
    """Paths of what was given and changes nothing, inside the translated fields."""
    yield from unread(asked)
    if asked.output_config and asked.output_config.effort != _effort(asked):
        yield "output_config.effort"
