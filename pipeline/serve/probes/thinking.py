"""Whether a model thinks, and whether that is shown."""

from typing import Any

from pipeline.serve.probes.reply import Reply
from pipeline.serve.probes.seen import Fault, Seen, not_shown, passed
from pipeline.serve.probes.subject import Subject

_MAX_TOKENS = 256
_TAG = "<think>"


async def reasoning(subject: Subject) -> Seen:
    """Switched on and off."""
    return await _switch(
        subject, {"reasoning": {"enabled": True}}, {"reasoning": {"enabled": False}}
    )


async def reasoning_effort(subject: Subject) -> Seen:
    """The same by its other name."""
    return await _switch(
        subject,
        {"reasoning": None, "reasoning_effort": "high"},
        {"reasoning": None, "reasoning_effort": "none"},
    )


async def include_reasoning(subject: Subject) -> Seen:
    """It is thought, and not shown."""
    thoughts = {"reasoning": {"enabled": True}, "max_tokens": _MAX_TOKENS}
    if not _thinks(await subject.ask(**thoughts)):
        return not_shown("it does not think")
    reply = await subject.ask(**thoughts, include_reasoning=False)
    if reply.first.reasoning:
        raise Fault("reasoning was to be hidden, and is shown")
    if _TAG in reply.first.text:
        raise Fault(f"reasoning was to be hidden, and {_TAG} is in the text")
    return passed(f"{reply.num_reasoning_tokens} tokens of reasoning, none shown")


async def _switch(subject: Subject, on: dict[str, Any], off: dict[str, Any]) -> Seen:
    quiet = await subject.ask(**off, max_tokens=_MAX_TOKENS)
    if _thinks(quiet):
        raise Fault("switched off, it thinks")
    loud = await subject.ask(**on, max_tokens=_MAX_TOKENS)
    if _TAG in loud.first.text or _TAG in quiet.first.text:
        raise Fault(f"{_TAG} is in the text")
    if not _thinks(loud):
        return not_shown("switched on or off, it does not think")
    return passed(f"{loud.num_reasoning_tokens} tokens on, {quiet.num_reasoning_tokens} off")


def _thinks(reply: Reply) -> bool:
    return bool(reply.first.reasoning or reply.num_reasoning_tokens)
