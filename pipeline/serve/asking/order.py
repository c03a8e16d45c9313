"""A chat request decided against a model: mode, sampling, prompt, and what is not honoured."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.chat import END_THINK, Chat, Mode
from pipeline.engine.protocol import PLAIN, RECOMMENDED, Capability, Lane, Sampling
from pipeline.errors import Availability, DataError, RequestError
from pipeline.serve.asking.compression import compress
from pipeline.serve.asking.constraints import Constraints, find_constraints
from pipeline.serve.asking.ignored import find_ignored
from pipeline.serve.asking.reasoning import find_budget, find_mode, shows_reasoning
from pipeline.serve.asking.request import COMPRESSION, ChatRequest
from pipeline.serve.offer.catalog import Served

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
# With a text in place of messages, these ask for nothing.
_OF_DIALOGUE = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "structured_outputs",
    "reasoning",
    "reasoning_effort",
    "include_reasoning",
)
_SHORT_CHARACTERS = 8192
_SHARE_OF_REPLY = 4
"""Compression leaves this part of the context to a reply whose length nothing bounds."""
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
    """Of every phase; `max_tokens` are for all of them together."""
    lane: Lane = field(default_factory=Lane)
    is_begun: bool = False
    """Whether the prompt ends with the beginning of the answer."""
    is_raw: bool = False
    """Whether it is a text to be continued: no dialogue, no thought, no call."""
    is_compressed: bool = False
    """Whether messages were left out for want of room."""
    budget: int | None = None
    """At most so many tokens of reasoning."""
    stops: tuple[str, ...] = ()
    """They end the answer; reasoning passes them by."""
    ends_after_thinking: bool = False
    constraints: Constraints = field(default_factory=Constraints)
    top_logprobs: int | None = None
    """Of the answer's tokens, as in a Sampling."""
    num_choices: int = 1
    shows_reasoning: bool = True
    ignored: tuple[str, ...] = ()
    """Request fields that change nothing here, named to the client."""

    @property
    def splits_thinking(self) -> bool:
        """Whether the engine must be asked anew once the thought is over."""
        wants = self.constraints
        return (
            self.budget is not None
            or self.ends_after_thinking
            or self.top_logprobs is not None
            or wants.answer is not None
            or wants.calls is not None
        )


def decide(request: ChatRequest, served: Served, lane: Lane = PLAIN) -> Order:
    """Honour, refuse or name every field; RequestError carries the status of a refusal.

    The lane's adapter is the model's.
    """
    _refuse_unsupported(request)
    lane = replace(lane, adapter=served.adapter)
    if not request.messages:
        return _continue(request, served, lane)
    able = served.engine.capabilities
    is_begun = _is_begun(request)
    mode = "direct" if is_begun else find_mode(request)
    constraints = find_constraints(request, able, served.chat)
    if is_begun and constraints.is_owed:
        raise RequestError(
            "messages: an answer that has begun can be held to no form and to no call; "
            "leave out the last message, or response_format and tool_choice",
            error_type="invalid_prompt",
        )
    render = functools.partial(_prompt_ids, served.chat, constraints.tools, mode, is_begun)
    prompt_ids, is_compressed = _fitted(request, served, render)
    max_tokens = _max_tokens(request, served, len(prompt_ids))
    stops = [stop for stop in request.stop or () if stop]
    return Order(
        prompt_ids=prompt_ids,
        mode=mode,
        sampling=_sampling(request, served, mode, max_tokens),
        lane=lane,
        is_begun=is_begun,
        is_compressed=is_compressed,
        budget=find_budget(request, max_tokens) if mode == "thinking" else None,
        stops=tuple(stop for stop in stops if stop != END_THINK),
        ends_after_thinking=mode == "thinking" and END_THINK in stops,
        constraints=constraints,
        top_logprobs=_top_logprobs(request, able),
        num_choices=request.n or 1,
        shows_reasoning=shows_reasoning(request),
        ignored=tuple(find_ignored(request, able, constraints)),
    )


def is_short(request: ChatRequest) -> bool:
    """Whether `decide` takes no more than a few milliseconds."""
    if request.tools or request.response_format:  # schemas may take long, whatever their size
        return False
    num_characters = len(request.prompt or "")
    for message in request.messages or ():
        for value in message.values():
            for part in value if isinstance(value, list) else (value,):
                text = part.get("text") if isinstance(part, dict) else part
                num_characters += len(text) if isinstance(text, str) else 0
    return num_characters <= _SHORT_CHARACTERS


def _continue(request: ChatRequest, served: Served, lane: Lane) -> Order:
    """Of a text: what belongs to a dialogue is ignored."""
    prompt_ids = served.chat.reply_ids(request.prompt or "")
    if not prompt_ids:
        raise RequestError("prompt: it is empty; there is nothing to continue")
    able = served.engine.capabilities
    dialogue = [name for name in _OF_DIALOGUE if getattr(request, name) is not None]
    return Order(
        prompt_ids=prompt_ids,
        mode="direct",
        sampling=replace(
            _sampling(request, served, "direct", _max_tokens(request, served, len(prompt_ids))),
            top_logprobs=_top_logprobs(request, able),
        ),
        lane=lane,
        is_raw=True,
        stops=tuple(stop for stop in request.stop or () if stop),
        top_logprobs=_top_logprobs(request, able),
        num_choices=request.n or 1,
        ignored=(*find_ignored(request, able, Constraints()), *dialogue),
    )


def _refuse_unsupported(request: ChatRequest) -> None:
    """What cannot be left out without answering another question than the client's."""
    others = [kind for kind in request.modalities or () if kind != "text"]
    if others:
        wanted = ", ".join(sorted({*others, "text"}))
        raise _no_endpoint(f"the requested output modalities: {wanted}")
    for message in request.messages or ():
        _refuse_other_parts(message.get("content"))
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs: send logprobs: true with it")


def _refuse_other_parts(content: Any) -> None:
    for part in content if isinstance(content, list) else ():
        if part["type"] != "text":
            raise _no_endpoint(f"{_KINDS.get(part['type'], part['type'])} input")


def _no_endpoint(what: str) -> RequestError:
    availability = Availability("no_endpoints")
    what = f"No endpoints found that support {what}"
    return RequestError(what, 404, "not_found", availability=availability)


def _is_begun(request: ChatRequest) -> bool:
    """Whether the last message is the beginning of the answer, to be continued."""
    messages = request.messages or [{}]
    if messages[-1].get("role") != "assistant":
        return False
    if messages[-1].get("tool_calls"):
        raise RequestError(
            "messages: the last message calls tools; answer it with messages of role tool",
            error_type="invalid_prompt",
        )
    return True


Messages = list[dict[str, Any]]


def _prompt_ids(
    chat: Chat, tools: list[dict[str, Any]], mode: Mode, is_begun: bool, messages: Messages
) -> list[int]:
    try:
        if is_begun:
            return chat.begun_ids(messages, tools)
        return chat.prompt_ids(messages, tools, mode)
    except DataError as error:
        raise RequestError(f"messages: {error}", 400, "invalid_prompt") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error


def _fitted(
    request: ChatRequest, served: Served, render: Callable[[Messages], list[int]]
) -> tuple[list[int], bool]:
    """The prompt, and whether something was left out so that it leaves room for the reply."""
    messages = [under_its_name(message) for message in request.messages or ()]
    prompt_ids = render(messages)
    asked = request.max_completion_tokens or request.max_tokens
    reply = served.context_tokens // _SHARE_OF_REPLY if asked is None else asked
    room = served.context_tokens - reply
    is_wanted = request.has_plugin(COMPRESSION) or "middle-out" in (request.transforms or ())
    if not is_wanted or len(prompt_ids) <= room:
        return prompt_ids, False
    fitting = compress(messages, lambda fewer: len(render(fewer)) <= room)
    return (render(fitting), True) if fitting else (prompt_ids, False)


def under_its_name(message: dict[str, Any]) -> dict[str, Any]:
    """A user's name goes before what the user says: the template has no place for it."""
    name, content = message.get("name"), message.get("content")
    if message["role"] != "user" or not name:
        return message
    mark = f"{name}: "
    parts = [{"type": "text", "text": mark}, *content] if isinstance(content, list) else None
    return {**message, "content": parts or mark + (content or "")}


def _max_tokens(request: ChatRequest, served: Served, num_prompt_tokens: int) -> int:
    """As many as asked, or as there is room for."""
    room = served.context_tokens - num_prompt_tokens
    asked = request.max_completion_tokens or request.max_tokens
    most = served.max_completion_tokens
    if asked is not None and asked > most and served.max_tokens:
        raise RequestError(
            f"max_tokens: a reply of {served.slug} has at most {most} tokens, not {asked}",
            error_type="max_tokens_exceeded",
        )
    asked = asked or max(min(room, most), 1)
    if asked > room:
        raise RequestError(
            f"This endpoint's maximum context length is {served.context_tokens} tokens. However, "
            f"you requested about {num_prompt_tokens + asked} tokens ({num_prompt_tokens} of text "
            f"input, {asked} in the output). Please reduce the length of either one, or use the "
            "context-compression plugin to compress your prompt automatically.",
            error_type="context_length_exceeded",
        )
    return asked


def _sampling(request: ChatRequest, served: Served, mode: Mode, max_tokens: int) -> Sampling:
    given = {name: getattr(request, name) for name in _SAMPLING}
    given = {name: value for name, value in given.items() if value is not None}
    bias = _logit_bias(request, served)
    return Sampling(max_tokens=max_tokens, logit_bias=bias, **{**RECOMMENDED[mode], **given})


def _logit_bias(request: ChatRequest, served: Served) -> dict[int, float]:
    """By token id; RequestError for one that the vocabulary has not."""
    bias = {}
    for key, value in (request.logit_bias or {}).items():
        if not (
            key.isascii() and key.isdigit() and len(key) < 10 and int(key) < served.chat.num_ids
        ):
            raise RequestError(
                f"logit_bias: {key[:32]!r} is no token id of this model; ids are whole numbers "
                f"below {served.chat.num_ids}"
            )
        bias[int(key)] = value
    return bias


def _top_logprobs(request: ChatRequest, able: frozenset[Capability]) -> int | None:
    if not request.logprobs or "logprobs" not in able:
        return None
    return request.top_logprobs or 0
