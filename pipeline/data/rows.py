"""Conversations to rows: one per trained assistant turn, exactly as inference renders it."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal
from unicodedata import normalize

from pipeline.chat import (
    END_OF_TURN,
    TAGS,
    Chat,
    Message,
    Mode,
    Turn,
    mode_of,
    prepare_message,
    without_reasoning,
)
from pipeline.data.conversation import Conversation, Document, Pair, is_trained, source_of
from pipeline.data.notes import Notes
from pipeline.data.switches import insert_switches
from pipeline.errors import DataError
from pipeline.recipe import Data

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Row:
    """What a model is given and what it learns to emit: design law 1."""

    prompt_ids: list[int]
    """Empty for a plain text."""
    completion_ids: list[int]
    """Through <|im_end|>, once, at the end; of a plain text as it stands."""
    source: str
    """`path:line` of the conversation."""
    turn: int
    """The assistant message's place in it; 0 for a text and a pair's reply."""
    mode: Mode | Literal["text"]
    """Which generation prompt the row has."""


@dataclass(frozen=True)
class PairRow:
    """A prompt with a preferred and a refused completion."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    source: str
    mode: Mode


def make_rows(
    conversation: Conversation, chat: Chat, data: Data, seed: int, notes: Notes
) -> list[Row]:
    """Rows of one conversation. Raises DataError at its line where it cannot become rows."""
    messages = [prepare_message(message) for message in conversation.messages]
    if data.thinking == "never":
        messages = [without_reasoning(message) for message in messages]
    answers = _answers(conversation, data, notes)
    modes = {index: mode_of(messages[index]) for index in answers}
    if data.soft_switches:
        messages, switched = insert_switches(
            conversation, messages, data.soft_switches, seed, notes
        )
        modes |= {index: "thinking" for index in switched if index in modes}
    _note_oddities(conversation, messages, answers, notes)
    rows: list[Row] = []
    for at, index in enumerate(answers):
        if data.thinking == "always" and mode_of(messages[index]) == "direct":
            notes.add("without_reasoning", f"{source_of(conversation)}: message {index}")
            continue
        turn = _turn(conversation, messages[: index + 1], modes[index], chat)
        if data.overlong == "drop" and _is_last_to_fit(messages, turn, data):
            _note_overlong(conversation, turn, data, notes, len(answers) - at)
            break
        fitting = _fit(conversation, messages[: index + 1], turn, chat, data, notes)
        if fitting:
            check_turn(conversation, fitting, chat)
            ids = fitting.prompt_ids, fitting.completion_ids
            rows.append(Row(*ids, source_of(conversation), index, fitting.mode))
    return rows


def make_text_rows(document: Document, chat: Chat, data: Data, notes: Notes) -> list[Row]:
    """A text's tokens and the one that ends a document, in rows of at most max_tokens."""
    ids = [*chat.text_ids(document.text), chat.token_id(END_OF_TEXT)]
    if normalize("NFC", chat.decode(ids[:-1])) != normalize("NFC", document.text):
        raise DataError.at(document.path, document.line, "the text's ids do not decode to it")
    cuts = list(range(0, len(ids), data.max_tokens))
    if len(cuts) > 1 and len(ids) - cuts[-1] == 1:
        cuts[-1] -= 1  # nothing can be learnt from a token alone: it has no beginning to follow
    if len(cuts) > 1:
        notes.add("texts_cut", f"{source_of(document)}: {len(ids)} tokens in {len(cuts)} rows")
    return [
        Row([], ids[start:end], source_of(document), 0, "text")
        for start, end in pairwise([*cuts, len(ids)])
    ]


def make_pair_rows(pair: Pair, chat: Chat, data: Data, notes: Notes) -> list[PairRow]:
    """A pair's row, or none if it is too long or left out. Raises DataError at its line."""
    turns = []
    for continuation in (pair.chosen, pair.rejected):
        messages = [prepare_message(message) for message in (*pair.messages, *continuation)]
        if data.thinking == "never":
            messages = [without_reasoning(message) for message in messages]
        if len(continuation) != 1:
            what = "chosen and rejected must be one assistant message each"
            raise DataError.at(pair.path, pair.line, what)
        turns.append(_turn(pair, messages, mode_of(messages[-1]), chat))
        check_turn(pair, turns[-1], chat)
    chosen, rejected = turns
    place = source_of(pair)
    if chosen.mode != rejected.mode:
        raise DataError(f"{place}: chosen and rejected must both have reasoning, or neither")
    if data.thinking == "always" and chosen.mode == "direct":
        notes.add("without_reasoning", place)
        return []
    longest = max(turns, key=_size)
    if _size(longest) > data.max_tokens:
        _note_overlong(pair, longest, data, notes)
        return []
    ids = chosen.prompt_ids, chosen.completion_ids, rejected.completion_ids
    return [PairRow(*ids, place, chosen.mode)]


def check_turn(sample: Conversation | Pair, turn: Turn, chat: Chat) -> None:
    """Hold a turn to what a row promises, whatever template and tokenizer it came through."""
    ids = turn.completion_ids
    control = [i for i in turn.prompt_ids if i in chat.control_ids]
    control += [i for i in ids if i in chat.control_ids]
    fault = None
    if not turn.completion.endswith(END_OF_TURN):
        fault = f"the template does not end the turn with {END_OF_TURN}"
    elif ids.count(chat.end_of_turn_id) != 1 or ids[-1] != chat.end_of_turn_id:
        fault = f"the trained ids do not hold {END_OF_TURN} once, at the end"
    elif control != turn.control_ids:
        fault = "the row holds control tokens that are not the template's own"
    elif normalize("NFC", chat.decode(ids)) != normalize("NFC", turn.completion):
        # Qwen3's own tokenizer composes accents; anything else it changed is a fault.
        fault = "the trained ids do not decode to the answer"
    if fault:
        raise DataError.at(sample.path, sample.line, f"message {turn.index}: {fault}")


def _size(turn: Turn) -> int:
    return len(turn.prompt_ids) + len(turn.completion_ids)


def _answers(conversation: Conversation, data: Data, notes: Notes) -> list[int]:
    """The places of the assistant turns to train; the others are context, and counted."""
    messages = conversation.messages
    roles = [message["role"] for message in messages]
    everything = [index for index, role in enumerate(roles) if role == "assistant"]
    first = roles.index("user") if "user" in roles else len(roles)
    if not everything or everything[-1] < first:
        what = "no assistant turn follows a user turn"
        raise DataError.at(conversation.path, conversation.line, what)
    answers = [index for index in everything if index > first and is_trained(messages[index])]
    context = len(everything) - len(answers)
    notes.add("context_only", source_of(conversation), context)
    return answers[-1:] if data.turns == "last" else answers


def _note_oddities(
    conversation: Conversation, messages: list[Message], answers: list[int], notes: Notes
) -> None:
    place = source_of(conversation)
    if messages[-1]["role"] != "assistant":
        notes.add("unanswered", place)
    named = [m for m in conversation.messages if m.get("name") and m["role"] != "tool"]
    notes.add("names", place, len(named))
    for index in answers:
        if any(tag in messages[index]["content"] for tag in TAGS):
            notes.add("stray_tags", f"{place}: message {index}")


def _turn(sample: Conversation | Pair, messages: list[Message], mode: Mode, chat: Chat) -> Turn:
    """The last of some messages as a turn; DataError at the sample's line."""
    try:
        return chat.turn(messages, sample.tools, len(messages) - 1, mode)
    except DataError as error:
        raise DataError.at(sample.path, sample.line, str(error)) from error


def _is_last_to_fit(messages: list[Message], turn: Turn, data: Data) -> bool:
    """Whether no later turn can fit either: they all have this prompt's messages in theirs.

    Inside a chain of calls that is not so: its reasoning is left out of later prompts.
    """
    follows_question = messages[turn.index - 1]["role"] == "user"
    return follows_question and len(turn.prompt_ids) > data.max_tokens


def _fit(
    conversation: Conversation,
    messages: list[Message],
    turn: Turn,
    chat: Chat,
    data: Data,
    notes: Notes,
) -> Turn | None:
    """A turn of at most max_tokens, or None; the messages end with it.

    Under split_history as little as possible of the oldest history is left out of its prompt.
    """
    if _size(turn) <= data.max_tokens:
        return turn
    if data.overlong == "split_history":
        shorter = list(_shorter(messages))

        def fits(cut: list[Message]) -> bool:
            return _size(_turn(conversation, cut, turn.mode, chat)) <= data.max_tokens

        first = bisect_left(shorter, True, key=fits)
        if first < len(shorter):
            notes.add("history_split", f"{source_of(conversation)}: message {turn.index}")
            return replace(_turn(conversation, shorter[first], turn.mode, chat), index=turn.index)
    _note_overlong(conversation, turn, data, notes)
    return None


def _shorter(messages: list[Message]) -> Iterator[list[Message]]:
    """A conversation with more and more of its oldest whole turns left out.

    System messages at its head stay, and so does everything from its last question on.
    """
    roles = [message["role"] for message in messages]
    head = next(at for at, role in enumerate(roles) if role != "system")
    for start, role in enumerate(roles):
        if role == "user" and start > head:
            yield [*messages[:head], *messages[start:]]


def _note_overlong(
    sample: Conversation | Pair, turn: Turn, data: Data, notes: Notes, number: int = 1
) -> None:
    """Count so many rows as too long, or refuse the first of them."""
    sentence = (
        f"{source_of(sample)}: message {turn.index}: the row has {_size(turn)} tokens, "
        f"data.max_tokens is {data.max_tokens}"
    )
    if data.overlong == "refuse":
        raise DataError(f"{sentence}; raise it or set data.overlong=drop")
    notes.add("overlong", sentence, number)
