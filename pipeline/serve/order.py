"""A chat request decided against a model: mode, sampling, prompt, and what is not honoured."""

from dataclasses import dataclass
from typing import Any

from pipeline.chat import Mode
from pipeline.engine.protocol import RECOMMENDED, Sampling
from pipeline.errors import DataError, RequestError
from pipeline.serve.catalog import Served
from pipeline.serve.request import HARMLESS, READ_OF_MESSAGES, ChatRequest, Reasoning

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
)
_KINDS = {
    "image_url": "image",
    "input_audio": "audio",
    "video_url": "video",
    "input_video": "video",
}


@dataclass(frozen=True)
class Order:
    """What is asked of the engine, and how the reply is shown."""

    prompt_ids: list[int]
    mode: Mode
    sampling: Sampling
    stops: tuple[str, ...]
    """They end the answer; reasoning passes them by."""
    tool_names: frozenset[str]
    max_calls: int | None
    """None is any number of tool calls."""
    shows_reasoning: bool
    ignored: tuple[str, ...]
    """Request fields that change nothing here, named to the client."""


def decide(request: ChatRequest, served: Served) -> Order:
    """Honour, refuse or name every field; RequestError carries the status of a refusal."""
    _refuse_unsupported(request)
    mode = _mode(request)
    tools = _tools(request)
    prompt_ids = _prompt_ids(request, served, tools, mode)
    return Order(
        prompt_ids=prompt_ids,
        mode=mode,
        sampling=_sampling(request, mode, _max_tokens(request, served, len(prompt_ids))),
        stops=tuple(stop for stop in request.stop or () if stop),
        tool_names=frozenset(tool["function"]["name"] for tool in tools),
        max_calls=1 if request.parallel_tool_calls is False else None,
        shows_reasoning=_shows_reasoning(request),
        ignored=tuple(_ignored(request, mode)),
    )


def _refuse_unsupported(request: ChatRequest) -> None:
    """What cannot be left out without answering another question than the client's."""
    if request.n is not None and request.n > 1:
        raise RequestError("n: only one choice is supported; send n: 1")
    if request.response_format is not None and request.response_format.type != "text":
        raise RequestError(
            f"response_format.type: {request.response_format.type!r} is not supported; send text"
        )
    others = [kind for kind in request.modalities or () if kind != "text"]
    if others:
        wanted = ", ".join(sorted({*others, "text"}))
        raise _no_endpoint(f"the requested output modalities: {wanted}")
    if request.tool_choice not in (None, "auto", "none"):
        raise _no_endpoint("the provided 'tool_choice' value.")
    messages = request.messages or ()
    for message in messages:
        _refuse_other_parts(message.get("content"))
    if messages and messages[-1]["role"] == "assistant":
        raise RequestError(
            "messages: a last message of role assistant (prefill) is not supported; "
            "end with a user or tool message",
            error_type="invalid_prompt",
        )


def _refuse_other_parts(content: Any) -> None:
    for part in content if isinstance(content, list) else ():
        if part["type"] != "text":
            raise _no_endpoint(f"{_KINDS.get(part['type'], part['type'])} input")


def _no_endpoint(what: str) -> RequestError:
    return RequestError(f"No endpoints found that support {what}", 404, "not_found")


def _mode(request: ChatRequest) -> Mode:
    """Thinking, unless it is switched off: that is Qwen3's own default."""
    wishes = _thinking_wishes(request)
    names = {thinks: name for name, thinks in wishes.items()}
    if len(names) == 2:
        raise RequestError(f"{names[True]} and {names[False]} contradict each other; send one")
    return "direct" if False in names else "thinking"


def _thinking_wishes(request: ChatRequest) -> dict[str, bool]:
    """Every field that says whether to think, as the client wrote it, and what it says."""
    reasoning, effort = request.reasoning or Reasoning(), request.reasoning_effort
    if reasoning.effort is not None and effort not in (None, reasoning.effort):
        raise RequestError('"reasoning.effort" and "reasoning_effort" differ; send one')
    budget = reasoning.max_tokens
    if budget is not None and (reasoning.effort or effort):
        raise RequestError(
            'Only one of "reasoning.effort" and "reasoning.max_tokens" can be specified'
        )
    wishes = {}
    if reasoning.enabled is not None:
        wishes[f'"reasoning.enabled": {str(reasoning.enabled).lower()}'] = reasoning.enabled
    if budget is not None:
        wishes[f'"reasoning.max_tokens": {budget}'] = budget > 0
    if reasoning.effort is not None:
        wishes[f'"reasoning.effort": "{reasoning.effort}"'] = reasoning.effort != "none"
    if effort is not None:
        wishes[f'"reasoning_effort": "{effort}"'] = effort != "none"
    return wishes


def _shows_reasoning(request: ChatRequest) -> bool:
    if request.reasoning is not None and request.reasoning.exclude is not None:
        return not request.reasoning.exclude
    return request.include_reasoning is not False


def _tools(request: ChatRequest) -> list[dict[str, Any]]:
    """As the client wrote them; none if they must not be called."""
    return [] if request.tool_choice == "none" else request.tools or []


def _prompt_ids(
    request: ChatRequest, served: Served, tools: list[dict[str, Any]], mode: Mode
) -> list[int]:
    try:
        return served.chat.prompt_ids(request.messages or [], tools, mode)
    except DataError as error:
        raise RequestError(f"messages: {error}", 400, "invalid_prompt") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error


def _max_tokens(request: ChatRequest, served: Served, num_prompt_tokens: int) -> int:
    """As many as asked, or as there is room for."""
    room = served.context_tokens - num_prompt_tokens
    asked = request.max_completion_tokens or request.max_tokens or max(room, 1)
    if asked > room:
        raise RequestError(
            f"This endpoint's maximum context length is {served.context_tokens} tokens. However, "
            f"you requested about {num_prompt_tokens + asked} tokens ({num_prompt_tokens} of text "
            f"input, {asked} in the output). Please reduce the length of either one, or use the "
            "context-compression plugin to compress your prompt automatically.",
            error_type="context_length_exceeded",
        )
    return asked


def _sampling(request: ChatRequest, mode: Mode, max_tokens: int) -> Sampling:
    given = {name: getattr(request, name) for name in _SAMPLING}
    given = {name: value for name, value in given.items() if value is not None}
    return Sampling(max_tokens=max_tokens, **{**RECOMMENDED[mode], **given})


def _ignored(request: ChatRequest, mode: Mode) -> list[str]:
    """Names of the fields that were given, are not null, and change nothing."""
    names = [
        name
        for name, value in (request.model_extra or {}).items()
        if value is not None and name not in HARMLESS
    ]
    if request.max_completion_tokens is not None and request.max_tokens not in (
        None,
        request.max_completion_tokens,
    ):
        names.append("max_tokens")
    return [*names, *_ignored_of_reasoning(request, mode), *_ignored_of_messages(request)]


def _ignored_of_reasoning(request: ChatRequest, mode: Mode) -> list[str]:
    reasoning = request.reasoning or Reasoning()
    extra = reasoning.model_extra or {}
    names = [f"reasoning.{name}" for name, value in extra.items() if value is not None]
    if reasoning.exclude is not None and request.include_reasoning is reasoning.exclude:
        names.append("include_reasoning")
    if mode == "thinking":
        # No budget is enforced: the model thinks for as long as it wants, within max_tokens.
        names += [
            f"reasoning.{name}"
            for name in ("max_tokens", "effort")
            if getattr(reasoning, name) is not None
        ]
        if request.reasoning_effort is not None:
            names.append("reasoning_effort")
    return names


def _ignored_of_messages(request: ChatRequest) -> list[str]:
    """Each name once, however many messages have it."""
    names = {
        f"messages[].{name}": None
        for message in request.messages or ()
        for name, value in message.items()
        if value is not None and name not in READ_OF_MESSAGES[message["role"]]
    }
    return list(names)
