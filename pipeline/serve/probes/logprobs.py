"""Log-probabilities of what was said."""

from pipeline.serve.probes.client import Body
from pipeline.serve.probes.seen import Fault, Seen, not_shown, passed, quoted
from pipeline.serve.probes.subject import Subject

_KEYS = ("token", "logprob", "bytes", "top_logprobs")
_TOP = 3


async def logprobs(subject: Subject) -> Seen:
    """Of every token of the text."""
    reply = await subject.ask(logprobs=True)
    tokens = _checked(reply.first.logprobs)
    said = b"".join(bytes(token["bytes"] or b"") for token in tokens).decode(errors="replace")
    # What has ended the reply may be among them, and blanks around it are often taken away.
    if not _bare(said).startswith(_bare(reply.first.text)):
        raise Fault(f"their tokens make {quoted(said)}, the text is {quoted(reply.first.text)}")
    return passed(f"of {len(tokens)} tokens, which make the text")


async def top_logprobs(subject: Subject) -> Seen:
    """As many others as were asked for, the likeliest first."""
    tokens = _checked((await subject.ask(logprobs=True, top_logprobs=_TOP)).first.logprobs)
    for token in tokens:
        others = [other["logprob"] for other in token["top_logprobs"]]
        if len(others) != _TOP:
            raise Fault(f"{_TOP} were asked for, {len(others)} came of {token['token']!r}")
        if others != sorted(others, reverse=True):
            raise Fault(f"those of {token['token']!r} are not sorted")
    return passed(f"{_TOP} of each of {len(tokens)} tokens")


async def in_stream(subject: Subject) -> Seen:
    """The same when they are streamed."""
    whole = await subject.ask(logprobs=True)
    streamed = (await subject.ask_stream(logprobs=True)).reply()
    tokens = _checked(streamed.first.logprobs)
    if whole.first.text != streamed.first.text:
        return not_shown(f"{len(tokens)} tokens came; the text is another")
    if len(tokens) != len(_checked(whole.first.logprobs)):
        raise Fault(f"{len(tokens)} tokens streamed, of {len(whole.first.logprobs or ())}")
    return passed(f"of {len(tokens)} tokens")


def _bare(text: str) -> str:
    return "".join(text.split())


def _checked(tokens: object) -> list[Body]:
    if not isinstance(tokens, list) or not tokens:
        raise Fault("there are none")
    for token in tokens:
        if missing := [key for key in _KEYS if key not in token]:
            raise Fault(f"a token lacks {', '.join(missing)}")
        if not token["logprob"] <= 0:
            raise Fault(f"the logprob of {token['token']!r} is {token['logprob']}")
    return tokens
