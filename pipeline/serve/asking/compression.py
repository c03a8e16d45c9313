"""Messages made to fit: the middle of a conversation is left out, then the middle of long texts."""

from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]
Fits = Callable[[list[Message]], bool]
CUT = " […] "
"""Stands where the middle of a text was."""
MIN_CHARACTERS = 200
"""No text is cut to less: what is left of it would say nothing."""
_PRECISION = 32
"""The search for a text's length ends within this part of it."""


def compress(messages: Sequence[Message], fits: Fits) -> list[Message] | None:
    """As few messages left out as is needed, else also texts cut; None if nothing helps.

    Kept whole are system messages; kept are the first and the last message and the last of the
    user. A call and its results stay or go together. `fits` is costly and is asked a few times: the
    number grows with the logarithm of the number of messages and of the longest text's length.
    """
    whole = list(messages)
    if fits(whole):
        return whole
    order = _middle_first(_exchanges(whole), _kept(whole))
    most = _without(whole, order)
    if not order or not fits(most):
        return _cut(most, fits)
    left_out, enough = 0, len(order)
    while enough - left_out > 1:
        middle = (left_out + enough) // 2
        if fits(_without(whole, order[:middle])):
            enough = middle
        else:
            left_out = middle
    return _without(whole, order[:enough])


def _exchanges(messages: Sequence[Message]) -> list[list[int]]:
    """Places of messages that stay or go together: a call with its results, any other alone."""
    exchanges: list[list[int]] = []
    callers: dict[str, list[int]] = {}
    latest: list[int] | None = None
    for place, message in enumerate(messages):
        if message["role"] == "tool":
            found = callers.get(str(message.get("tool_call_id")), latest)
            if found is not None:
                found.append(place)
                continue
        exchanges.append([place])
        if calls := message.get("tool_calls"):
            latest = exchanges[-1]
            callers |= {str(call.get("id")): latest for call in calls}
    return exchanges


def _kept(messages: Sequence[Message]) -> set[int]:
    """Places of what is never left out."""
    roles = [message["role"] for message in messages]
    system = {place for place, role in enumerate(roles) if _is_system(role)}
    others = [place for place in range(len(roles)) if place not in system]
    users = [place for place, role in enumerate(roles) if role == "user"]
    return system | set(others[:1]) | set(others[-1:]) | set(users[-1:])


def _is_system(role: str) -> bool:
    return role in ("system", "developer")


def _middle_first(exchanges: Sequence[list[int]], kept: set[int]) -> list[list[int]]:
    """What may be left out, in that order; what is nearer to the end goes later."""
    droppable = [places for places in exchanges if kept.isdisjoint(places)]
    centre = (len(droppable) - 1) / 2
    ranked = sorted(enumerate(droppable), key=lambda ranked: abs(ranked[0] - centre))
    return [places for _, places in ranked]


def _without(messages: Sequence[Message], left_out: Sequence[list[int]]) -> list[Message]:
    places = {place for exchange in left_out for place in exchange}
    return [message for place, message in enumerate(messages) if place not in places]


def _cut(messages: Sequence[Message], fits: Fits) -> list[Message] | None:
    """The longest texts are cut to one length, the greatest that fits."""
    fitting = _shortened(messages, MIN_CHARACTERS)
    if not fits(fitting):
        return None
    shortest, longest = MIN_CHARACTERS, max(map(len, _texts(messages)), default=0)
    while longest - shortest > shortest / _PRECISION:
        middle = (shortest + longest) // 2
        attempt = _shortened(messages, middle)
        if fits(attempt):
            fitting, shortest = attempt, middle
        else:
            longest = middle
    return fitting


def _texts(messages: Sequence[Message]) -> list[str]:
    """Those that may be cut."""
    texts: list[str] = []
    for message in messages:
        content = message.get("content") or ""
        if _is_system(message["role"]):
            continue
        if isinstance(content, str):
            texts.append(content)
        else:
            texts += [part.get("text") or "" for part in content]
    return texts


def _shortened(messages: Sequence[Message], num_characters: int) -> list[Message]:
    return [
        message
        if _is_system(message["role"])
        else {**message, "content": _shortened_content(message.get("content"), num_characters)}
        for message in messages
    ]


def _shortened_content(content: Any, num_characters: int) -> Any:
    if isinstance(content, str):
        return _without_middle(content, num_characters)
    if not content:
        return content
    return [
        {**part, "text": _without_middle(part["text"], num_characters)}
        if part.get("text")
        else part
        for part in content
    ]


def _without_middle(text: str, num_characters: int) -> str:
    if len(text) <= num_characters:
        return text
    num_ends = num_characters - len(CUT)
    num_first = (num_ends + 1) // 2
    return text[:num_first] + CUT + text[len(text) - (num_ends - num_first) :]
