"""Who and what is refused, and how."""

from pipeline.serve.probes.client import Answer
from pipeline.serve.probes.seen import Fault, Seen, passed
from pipeline.serve.probes.subject import Subject

_NOBODY = "sk-or-v1-nobody"
_NOTHING = "nobody/no-such-model"


async def no_key(subject: Subject) -> Seen:
    """A request that says not whose it is."""
    return _refused(await subject.client.post(subject.body(max_tokens=1), key=""), 401)


async def wrong_key(subject: Subject) -> Seen:
    """One with a key that nobody was given."""
    return _refused(await subject.client.post(subject.body(max_tokens=1), key=_NOBODY), 401)


async def unknown_model(subject: Subject) -> Seen:
    """400 on OpenRouter, 404 elsewhere, which a router counts as an outage."""
    answer = await subject.client.post(subject.body(model=_NOTHING))
    seen = _refused(answer, 400, 404)
    return passed(f"{seen.what}; a router counts it as down time") if answer.status == 404 else seen


async def no_json(subject: Subject) -> Seen:
    """A body that cannot be read."""
    return _refused(await subject.client.post(b'{"model": '), 400, 422)


async def wrong_type(subject: Subject) -> Seen:
    """A field whose value is none."""
    return _refused(await subject.client.post(subject.body(messages="hello")), 400, 422)


def _refused(answer: Answer, *statuses: int) -> Seen:
    if answer.status not in statuses:
        wanted = " or ".join(map(str, statuses))
        raise Fault(f"status {answer.status}, not {wanted}")
    return passed(f"{answer.status}: {answer.error()}")
