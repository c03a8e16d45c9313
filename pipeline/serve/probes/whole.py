"""A reply that is not streamed."""

from pipeline.serve.probes.reply import FINISHES, check_usage
from pipeline.serve.probes.seen import Fault, Seen, passed, quoted
from pipeline.serve.probes.subject import Subject


async def reply(subject: Subject) -> Seen:
    """Text, and why it ends."""
    choice = (await subject.ask()).first
    if choice.finish not in FINISHES:
        raise Fault(f"finish_reason is {choice.finish!r}")
    if not choice.text and not choice.reasoning:
        raise Fault("it is empty")
    return passed(f"{quoted(choice.text)}, {choice.finish}")


async def usage(subject: Subject) -> Seen:
    """What was used."""
    return passed(check_usage((await subject.ask()).usage))


async def model(subject: Subject) -> Seen:
    """The one that was asked."""
    named = (await subject.ask()).model
    if named != subject.declared.model:
        raise Fault(f"{subject.declared.model} was asked, and {named!r} answers")
    return passed(str(named))
