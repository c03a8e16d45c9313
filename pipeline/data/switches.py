"""Qwen3's soft switches, /think and /no_think, put into questions."""

import re

from pipeline.chat import Message, mode_of
from pipeline.data.conversation import Conversation, source_of
from pipeline.data.mix import draw
from pipeline.data.notes import Notes

_SWITCH = re.compile(r"/(?:no_)?think\b")


def insert_switches(
    conversation: Conversation,
    messages: list[Message],
    probability: float,
    seed: int,
    notes: Notes,
) -> tuple[list[Message], set[int]]:
    """Add soft switches to questions as Qwen did (Qwen3 technical report, section 4.3).

    Returns the messages, and the places of direct answers that now follow a /no_think: these are
    trained in thinking mode, where the model itself has to write the empty block.
    A question that has a switch keeps it; one answered in both modes gets none. As the last switch
    holds, a later question that is answered in the other mode gets its own.
    """
    changed, after_no_think = list(messages), set[int]()
    questions = [at for at, message in enumerate(messages) if message["role"] == "user"]
    last = ""  # the switch that holds until another comes
    for start, end in zip(questions, [*questions[1:], len(messages)], strict=True):
        answers = [at for at in range(start, end) if messages[at]["role"] == "assistant"]
        modes = {mode_of(messages[at]) for at in answers}
        text = messages[start]["content"]
        content = (conversation.messages, conversation.tools)
        if own := _SWITCH.findall(text):
            last = own[-1]
        if own or len(modes) != 1:
            continue
        switch = "/no_think" if "direct" in modes else "/think"
        is_drawn = draw(seed, f"switch {start}", content) < probability
        if not is_drawn and last in ("", switch):
            continue
        last = switch
        changed[start] = messages[start] | {"content": f"{text} {switch}"}
        if switch == "/no_think":
            after_no_think |= set(answers)
            notes.add("switched_no_think", source_of(conversation))
        else:
            notes.add("switched_think", source_of(conversation))
    return changed, after_no_think
