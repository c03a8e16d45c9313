"""The only room that knows Qwen3's dialogue: conversation to turns, text to reasoning and answer.

Training, evaluation and serving all render and parse here, so they cannot differ. Nothing here
needs torch or transformers: the checkpoint's own template runs in Jinja2's sandbox, its own
tokenizer in `tokenizers`.
"""

from pipeline.chat.message import (
    ROLES,
    Message,
    Mode,
    check_message,
    prepare_message,
    prepare_tools,
    reasoning_of,
    text_of,
    without_reasoning,
)
from pipeline.chat.render import END_OF_TURN, Chat, Turn, mode_of, template_text
from pipeline.chat.reply import (
    CALL,
    EARLY_STOP,
    END_CALL,
    END_THINK,
    TAGS,
    THINK,
    Piece,
    Reply,
    Splitter,
    ToolCall,
    Untagged,
    is_well_formed,
    parse_call,
    parse_reply,
    without_tags,
)

__all__ = [
    "CALL",
    "EARLY_STOP",
    "END_CALL",
    "END_OF_TURN",
    "END_THINK",
    "ROLES",
    "TAGS",
    "THINK",
    "Chat",
    "Message",
    "Mode",
    "Piece",
    "Reply",
    "Splitter",
    "ToolCall",
    "Turn",
    "Untagged",
    "check_message",
    "is_well_formed",
    "mode_of",
    "parse_call",
    "parse_reply",
    "prepare_message",
    "prepare_tools",
    "reasoning_of",
    "template_text",
    "text_of",
    "without_reasoning",
    "without_tags",
]
