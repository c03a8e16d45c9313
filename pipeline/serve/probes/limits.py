"""What ends a reply, and how many there are."""

from pipeline.serve.probes.seen import Fault, Seen, not_shown, passed, quoted
from pipeline.serve.probes.subject import Subject


async def max_tokens(subject: Subject) -> Seen:
    """Half of what a reply would have."""
    return await _bound(subject, "max_tokens")


async def max_completion_tokens(subject: Subject) -> Seen:
    """The same by its other name."""
    return await _bound(subject, "max_completion_tokens")


async def _bound(subject: Subject, name: str) -> Seen:
    free = (await subject.ask()).num_tokens
    half = free // 2
    if not half:
        return not_shown(f"a reply has {free} tokens")
    reply = await subject.ask(**{"max_tokens": None, name: half})
    if reply.num_tokens > half:
        raise Fault(f"{half} tokens were allowed, {reply.num_tokens} came")
    if reply.num_tokens == half and reply.first.finish != "length":
        raise Fault(f"cut after {half} tokens, finish_reason is {reply.first.finish!r}")
    return passed(f"{reply.num_tokens} of {free} tokens, {reply.first.finish}")


async def stop(subject: Subject) -> Seen:
    """A bit of the middle of what it says otherwise."""
    text = await subject.text()
    word = text[len(text) // 2 :][:3]
    if not word.strip():
        return not_shown(f"it says {quoted(text)}")
    choice = (await subject.ask(stop=[word])).first
    if word in choice.text:
        raise Fault(f"it was to stop at {word!r}, and says {quoted(choice.text)}")
    if choice.finish != "stop":
        raise Fault(f"it has stopped, and finish_reason is {choice.finish!r}")
    return passed(f"{len(choice.text)} of {len(text)} characters, before {word!r}")


async def n(subject: Subject) -> Seen:
    """Two choices."""
    number = len((await subject.ask(n=2)).choices)
    if number != 2:
        raise Fault(f"2 choices were asked for, {number} came")
    return passed("2 choices")
