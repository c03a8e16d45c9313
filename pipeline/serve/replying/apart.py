"""A bit of a continuation that holds a tag among other tokens, taken apart."""

from collections.abc import Mapping

from pipeline.engine.protocol import Delta


def take_apart(delta: Delta, tags: Mapping[int, str]) -> list[Delta]:
    """Tags as bits of their own, so that tokens before and after them are counted apart.

    An engine under load tells of several tokens at once, and no count is to depend on that. `tags`
    are texts by the ids of their tokens. Where the engine tells no ids the delta stays whole.
    """
    parts: list[Delta] = []
    rest = delta
    while len(rest.ids) > 1 and (place := _first(rest.ids, tags)) is not None:
        tag = tags[rest.ids[place]]
        before, found, after = rest.text.partition(tag)
        if not found:
            break
        if place:
            parts.append(_part(rest, before, 0, place))
        parts.append(_part(rest, tag, place, place + 1))
        rest = rest._replace(
            text=after,
            num_tokens=rest.num_tokens - place - 1,
            ids=rest.ids[place + 1 :],
            logprobs=rest.logprobs[place + 1 :],
        )
    return [*parts, rest]


def _first(ids: tuple[int, ...], tags: Mapping[int, str]) -> int | None:
    return next((place for place, token in enumerate(ids) if token in tags), None)


def _part(delta: Delta, text: str, begin: int, end: int) -> Delta:
    """Its tokens are counted by whoever counts them one by one."""
    return delta._replace(
        text=text,
        num_tokens=end - begin,
        finish=None,
        ids=delta.ids[begin:end],
        logprobs=delta.logprobs[begin:end],
        stop_id=None,
    )
