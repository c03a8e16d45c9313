"""Which replies are kept: finished, well-formed, and exactly what training will render again."""

import json
import re
import sys
from typing import Any, Literal
from unicodedata import normalize

from pipeline.chat import (
    END_OF_TURN,
    TAGS,
    Chat,
    Message,
    is_well_formed,
    parse_reply,
)
from pipeline.data.conversation import Conversation, Record
from pipeline.data.formats import parse
from pipeline.data.notes import Notes
from pipeline.data.rows import Row, make_rows
from pipeline.data.strict_json import parse_json
from pipeline.engine.protocol import Finish
from pipeline.errors import DataError
from pipeline.recipe import Data, Source
from pipeline.replay.prompts import Prompt

Reason = Literal["unfinished", "malformed", "blank", "foreign tool", "control token", "inexact"]
_LINE_BREAKS = re.compile(rf"\n*({'|'.join(map(re.escape, (*TAGS, END_OF_TURN)))})\n*")

# Whatever a recipe's own data.max_tokens is: that stage counts what it leaves out for length.
_WHOLE = Data(sources=(Source(path="replay.jsonl"),), max_tokens=sys.maxsize)


def judge(prompt: Prompt, text: str, finish: Finish | None, chat: Chat) -> Reason | None:
    """Why a reply in thinking mode is not kept; None if it is. `text` is without <|im_end|>."""
    reply = parse_reply(text, "thinking")
    says = reply.answer.strip() or reply.calls
    reasons: dict[Reason, bool] = {
        "unfinished": finish != "stop",
        # Bytes that are no character come as U+FFFD.
        "malformed": not is_well_formed(text, "thinking") or "\ufffd" in text,
        "blank": not reply.reasoning.strip() or not says,
        "foreign tool": any(call.name not in prompt.tool_names for call in reply.calls),
        "control token": _has_control_token(text, chat),
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return found or (None if _is_exact(prompt, text, chat) else "inexact")


def assistant_message(text: str) -> Message:
    """A reply as a conversation's message, in OpenAI's shape with `reasoning_content`."""
    reply = parse_reply(text, "thinking")
    message: Message = {
        "role": "assistant",
        "content": reply.answer,
        "reasoning_content": reply.reasoning,
    }
    if reply.calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.calls
        ]
    return message


def conversation(prompt: Prompt, text: str) -> dict[str, Any]:
    """A prompt and the reply to it, as a line of a source.

    Only the reply is trained: an earlier assistant turn of the prompt is not the base's own.
    """
    earlier = [
        message | {"train": False} if message["role"] == "assistant" else message
        for message in prompt.messages
    ]
    tools = {"tools": list(prompt.tools)} if prompt.tools else {}
    return {"messages": [*earlier, assistant_message(text)], **tools, **prompt.labels}


def _has_control_token(text: str, chat: Chat) -> bool:
    """Whether the model left its turn for something only a template may write."""
    added = {token.content for token in chat.tokenizer.get_added_tokens_decoder().values()}
    return any(token in text for token in added.difference(TAGS))


def _is_exact(prompt: Prompt, text: str, chat: Chat) -> bool:
    """Whether training would ask the same ids and learn the same text, but for line breaks at tags.

    Those are the template's own. A call in other spacing or another key order is not exact.
    """
    try:
        rows = _rows(prompt, text, chat)
    except DataError:
        return False
    said = _bare(text + END_OF_TURN)
    asked_and_learnt = [(row.prompt_ids, _bare(chat.decode(row.completion_ids))) for row in rows]
    return asked_and_learnt == [(prompt.ids, said)]


def _rows(prompt: Prompt, text: str, chat: Chat) -> list[Row]:
    """What the data stage makes of the written line; raises DataError where it would refuse it."""
    line = json.dumps(conversation(prompt, text))
    sample = parse(Record(parse_json(line), prompt.path, prompt.line), "messages")
    assert isinstance(sample, Conversation)
    return make_rows(sample, chat, _WHOLE, 0, Notes())


def _bare(text: str) -> str:
    # Qwen3's own tokenizer composes accents.
    return _LINE_BREAKS.sub(r"\1", normalize("NFC", text))
