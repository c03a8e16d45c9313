"""Presets: fields that a request has unless it says otherwise, by a name the operator gave."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.errors import Availability, RequestError
from pipeline.serve.asking.request import HARMLESS, ChatRequest

MARK = "@preset/"
SYSTEM = "system"
"""A preset's text for a system message, where the request has none."""
Presets = Mapping[str, Mapping[str, Any]]


def with_preset(request: ChatRequest, presets: Presets) -> ChatRequest:
    """The request with the preset's fields beneath its own.

    It is named by `model`, as @preset/SLUG alone or after a model, or by `preset`. RequestError for
    one that is not there.
    """
    model, mark, slug = (request.model or "").partition(MARK)
    slug = slug if mark else (request.preset or "").removeprefix(MARK)
    if not slug:
        return request
    if slug not in presets:
        what = f"{slug} is no preset of this server"
        availability = Availability("model_not_found")
        raise RequestError(what, 404, "not_found", availability=availability)
    beneath = dict(presets[slug])
    system = beneath.pop(SYSTEM, None)
    given = ChatRequest.model_validate(beneath)
    own = {name for name in request.model_fields_set if getattr(request, name) is not None}
    update = {name: getattr(given, name) for name in given.model_fields_set - own}
    if mark:
        update["model"] = model or given.model
    if system and request.messages and not _has_system(request.messages):
        update["messages"] = [{"role": "system", "content": system}, *request.messages]
    return request.model_copy(update=update | {"preset": slug})


def check_preset(fields: Mapping[str, Any]) -> None:
    """ValueError for what a request could not say, or says in vain."""
    beneath = {name: value for name, value in fields.items() if name != SYSTEM}
    if not isinstance(fields.get(SYSTEM, ""), str):
        raise ValueError(f"{SYSTEM}: give a text")
    try:
        request = ChatRequest.model_validate(beneath)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ValueError(f"{place}: {fault['msg'].removeprefix('Value error, ')}") from error
    if unknown := set(request.model_extra or ()) - HARMLESS:
        raise ValueError(f"{min(unknown)}: no field of a request that does anything")


def _has_system(messages: list[dict[str, Any]]) -> bool:
    return any(message["role"] in ("system", "developer") for message in messages)
