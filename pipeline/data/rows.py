"""Conversations to rows: one per trained assistant turn, exactly as inference renders it."""

from collections import Counter
from dataclasses import dataclass
from unicodedata import normalize

from pipeline.chat import END_OF_TURN, Chat, Message, Mode, Turn, reasoning_of
from pipeline.data.messages import Conversation
from pipeline.errors import DataError
from pipeline.recipe import Data


@dataclass(frozen=True)
class Row:
    """What a model is given and what it learns to emit: design law 1."""

    prompt_ids: list[int]
    completion_ids: list[int]
    """Through <|im_end|>, once, at the end."""
    source: str
    """`path:line` of the conversation."""
    turn: int
    """The assistant message's place in it."""
    mode: Mode


def make_rows(
    conversation: Conversation, chat: Chat, data: Data, counts: Counter[str]
) -> list[Row]:
    """Rows of one conversation. Raises DataError at its line where it cannot become rows."""
    messages = conversation.messages
    if data.thinking == "never":
        messages = tuple(_without_reasoning(message) for message in messages)
    try:
        turns = list(chat.turns(messages, conversation.tools))
    except DataError as error:
        raise DataError.at(conversation.path, conversation.line, str(error)) from error
    if not turns:
        raise DataError.at(
            conversation.path, conversation.line, "no assistant turn follows a user turn"
        )
    if data.turns == "last":
        turns = turns[-1:]
    rows = []
    for turn in turns:
        if data.thinking == "always" and turn.mode == "direct":
            counts["without_reasoning"] += 1
        elif len(turn.prompt_ids) + len(turn.completion_ids) > data.max_tokens:
            _note_overlong(conversation, turn, data, counts)
        else:
            rows.append(_check(conversation, turn, chat))
    return rows


def _check(conversation: Conversation, turn: Turn, chat: Chat) -> Row:
    """Hold a turn to what a row promises, whatever template and tokenizer it came through."""
    ids = turn.completion_ids
    fault = None
    if not turn.completion.endswith(END_OF_TURN):
        fault = f"the template does not end the turn with {END_OF_TURN}"
    elif ids.count(chat.end_of_turn_id) != 1 or ids[-1] != chat.end_of_turn_id:
        fault = f"the trained ids do not hold {END_OF_TURN} once, at the end"
    elif normalize("NFC", chat.decode(ids)) != normalize("NFC", turn.completion):
        # Qwen3's own tokenizer composes accents; anything else it changed is a fault.
        fault = "the trained ids do not decode to the answer"
    if fault:
        raise DataError.at(conversation.path, conversation.line, f"message {turn.index}: {fault}")
    return Row(turn.prompt_ids, ids, conversation.source, turn.index, turn.mode)


def _note_overlong(
    conversation: Conversation, turn: Turn, data: Data, counts: Counter[str]
) -> None:
    num_tokens = len(turn.prompt_ids) + len(turn.completion_ids)
    if data.overlong == "refuse":
        raise DataError.at(
            conversation.path,
            conversation.line,
            f"message {turn.index}: the row has {num_tokens} tokens, data.max_tokens is "
            f"{data.max_tokens}; raise it or set data.overlong=drop",
        )
    counts["overlong"] += 1


def _without_reasoning(message: Message) -> Message:
    if message["role"] != "assistant" or not reasoning_of(message):
        return message
    hidden = ("reasoning", "reasoning_content", "reasoning_details")
    return {key: value for key, value in message.items() if key not in hidden}
