"""Many requests at once."""

import asyncio
from collections import Counter

from pipeline.serve.probes.seen import Fault, Seen, passed
from pipeline.serve.probes.subject import Subject

_AT_ONCE = 32
_WITH_WAIT = (429, 503)


async def at_once(subject: Subject) -> Seen:
    """Each is answered, or told at once when to come again."""
    asked = [subject.client.post(subject.body(max_tokens=8)) for _ in range(_AT_ONCE)]
    answers = await asyncio.gather(*asked)
    for answer in answers:
        if answer.status not in (200, *_WITH_WAIT):
            raise Fault(f"one of {_AT_ONCE} at once has status {answer.status}: {answer.error()}")
        if answer.status in _WITH_WAIT and not answer.headers.get("Retry-After", "").isdigit():
            raise Fault(f"status {answer.status} without seconds in Retry-After")
    counts = Counter(answer.status for answer in answers)
    shown = ", ".join(f"{number} × {status}" for status, number in sorted(counts.items()))
    return passed(f"{_AT_ONCE} at once: {shown}")
