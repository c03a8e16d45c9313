"""Which fields of a request change nothing, so that the client can be told their names."""

from typing import get_args

from pipeline.engine.protocol import Capability
from pipeline.serve.asking.constraints import Constraints
from pipeline.serve.asking.reasoning import ignored_of_reasoning
from pipeline.serve.asking.request import HARMLESS, READ_OF_MESSAGES, UNUSED, ChatRequest

_USUAL_TIERS = ("auto", "default")
_OF_ENGINES = [name for name in get_args(Capability) if name in ChatRequest.model_fields]


def find_ignored(
    request: ChatRequest, able: frozenset[Capability], constraints: Constraints
) -> list[str]:
    """Names of the fields that were given, are not null, and change nothing."""
    names = [name for name in UNUSED if getattr(request, name) is not None]
    names += [
        name
        for name, value in (request.model_extra or {}).items()
        if value is not None and name not in HARMLESS
    ]
    if request.service_tier not in (None, *_USUAL_TIERS):
        names.append("service_tier")
    if request.messages and request.prompt is not None:
        names.append("prompt")
    if request.max_completion_tokens is not None and request.max_tokens not in (
        None,
        request.max_completion_tokens,
    ):
        names.append("max_tokens")
    names += [
        name for name in _OF_ENGINES if name not in able and getattr(request, name) is not None
    ]
    if request.top_logprobs is not None and "logprobs" not in able:
        names.append("top_logprobs")
    if request.provider:
        extra = request.provider.model_extra or {}
        names += [f"provider.{name}" for name, value in extra.items() if value is not None]
    names += [f"transforms.{name}" for name in request.transforms or () if name != "middle-out"]
    names += ignored_of_reasoning(request)
    return [*names, *constraints.ignored, *_of_messages(request)]


def _of_messages(request: ChatRequest) -> list[str]:
    """Each name once, however many messages have it."""
    names = {
        f"messages[].{name}": None
        for message in request.messages or ()
        for name, value in message.items()
        if value is not None and name not in READ_OF_MESSAGES[message["role"]]
    }
    return list(names)
