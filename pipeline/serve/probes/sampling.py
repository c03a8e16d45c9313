"""How tokens are drawn: shown by replies that differ, or do not."""

from typing import Any

from pipeline.serve.probes.seen import Fault, Seen, not_shown, passed, quoted
from pipeline.serve.probes.subject import Subject

_HOT, _WARM = 2.0, 1.0
_DRAWS = 3
_MAX_TOKENS = 16
"""Few: the longer a reply, the likelier is a tie of two tokens that rounding decides."""
_SAME = "hot replies are as the cold one is"
_OPEN = [{"role": "user", "content": "Write three short sentences about the sea."}]
"""What can be answered in many ways."""
_AGAIN = [{"role": "user", "content": "Say the word sea again and again, with nothing between."}]
_IDS = ("32", "33")
"""Of two letters, where there are letters."""


async def temperature(subject: Subject) -> Seen:
    """None at all gives the same again, and much of it something else."""
    cold, again = [await _say(subject, **_seed(subject, number)) for number in range(2)]
    if again != cold:
        raise Fault(f"without temperature it says {quoted(cold)}, then {quoted(again)}")
    if not await _differs(subject, cold):
        return not_shown(_SAME)
    return passed("at 0 twice the same, hot not")


async def seed(subject: Subject) -> Seen:
    """The same draws the same."""
    first, again = [await _say(subject, temperature=_WARM, seed=7) for _ in range(2)]
    if first != again:
        raise Fault(f"with one seed it says {quoted(first)}, then {quoted(again)}")
    others = [await _say(subject, temperature=_WARM, seed=8 + i) for i in range(_DRAWS)]
    if set(others) == {first}:
        return not_shown("other seeds say the same")
    return passed("twice the same, and other seeds another")


async def top_p(subject: Subject) -> Seen:
    """Next to nothing leaves the likeliest token alone."""
    return await _cuts(subject, top_p=1e-6)


async def top_k(subject: Subject) -> Seen:
    """1 leaves the likeliest token alone."""
    return await _cuts(subject, top_k=1)


async def min_p(subject: Subject) -> Seen:
    """1 leaves the likeliest token alone."""
    return await _cuts(subject, min_p=1.0)


async def frequency_penalty(subject: Subject) -> Seen:
    """The highest changes what repeats itself."""
    return await _changes(subject, frequency_penalty=2.0)


async def presence_penalty(subject: Subject) -> Seen:
    """The highest changes what repeats itself."""
    return await _changes(subject, presence_penalty=2.0)


async def repetition_penalty(subject: Subject) -> Seen:
    """The highest changes what repeats itself."""
    return await _changes(subject, repetition_penalty=2.0)


async def logit_bias(subject: Subject) -> Seen:
    """Two tokens that are forced, one after the other."""
    free = await subject.text(max_tokens=4)
    forced = [await subject.text(max_tokens=4, logit_bias={token: 100}) for token in _IDS]
    if set(forced) == {free}:
        raise Fault(f"whichever token is forced, it says {quoted(free)}")
    return passed(f"{quoted(forced[0])} and {quoted(forced[1])}, not {quoted(free)}")


async def _say(subject: Subject, **fields: Any) -> str:
    return await subject.text(messages=_OPEN, max_tokens=_MAX_TOKENS, **fields)


def _seed(subject: Subject, number: int) -> dict[str, Any]:
    """So that draws may differ, where a seed acts."""
    return {"seed": number} if subject.has("seed") else {}


def _hot(subject: Subject) -> float:
    return subject.declared.most("temperature", _HOT)


async def _cuts(subject: Subject, **field: Any) -> Seen:
    """Whether hot replies are as cold ones under this, and only so."""
    cold = await _say(subject)
    if not await _differs(subject, cold):
        return not_shown(_SAME)
    for number in range(_DRAWS):
        fields = {"temperature": _hot(subject), **field, **_seed(subject, number)}
        if (said := await _say(subject, **fields)) != cold:
            raise Fault(f"it says {quoted(said)}, where the likeliest tokens are {quoted(cold)}")
    return passed("the likeliest tokens alone, however hot")


async def _differs(subject: Subject, cold: str) -> bool:
    """Whether a hot reply ever does."""
    for number in range(_DRAWS):
        fields = {"temperature": _hot(subject), **_seed(subject, number)}
        if await _say(subject, **fields) != cold:
            return True
    return False


async def _changes(subject: Subject, **field: Any) -> Seen:
    free = await subject.text(messages=_AGAIN)
    bent = await subject.text(messages=_AGAIN, **field)
    if bent == free:
        return not_shown("accepted; it says the same")
    return passed(f"{quoted(bent)}, not {quoted(free)}")
