"""A chat request decided against a model: mode, sampling, prompt, and what is not honoured."""

from dataclasses import dataclass, field, replace

from pipeline.chat import END_THINK, Mode
from pipeline.engine.protocol import PLAIN, RECOMMENDED, Capability, Lane, Sampling
from pipeline.errors import RequestError
from pipeline.serve.asking.compression import compress
from pipeline.serve.asking.constraints import Constraints
from pipeline.serve.asking.draft import Draft, make_draft, wants_compression
from pipeline.serve.asking.ignored import find_ignored
from pipeline.serve.asking.reasoning import find_budget, shows_reasoning
from pipeline.serve.asking.request import ChatRequest
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
_SHARE_OF_REPLY = 4
"""Compression leaves this part of the context to a reply whose length nothing bounds."""


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
    draft = make_draft(request, served)
    return settle(draft, draft.encode(draft.messages), lane)


def settle(draft: Draft, prompt_ids: list[int], lane: Lane = PLAIN) -> Order:
    """The rest of it, once the prompt's length is known: `prompt_ids` are what `encode` gives."""
    request, served = draft.request, draft.served
    prompt_ids, is_compressed = _fitted(draft, prompt_ids)
    max_tokens = _max_tokens(request, served, len(prompt_ids))
    able = served.engine.capabilities
    top_logprobs = _top_logprobs(request, able)
    sampling = _sampling(request, served, draft.mode, max_tokens)
    stops = tuple(stop for stop in request.stop or () if stop)
    return Order(
        prompt_ids=prompt_ids,
        mode=draft.mode,
        sampling=replace(sampling, top_logprobs=top_logprobs) if draft.is_raw else sampling,
        lane=replace(lane, adapter=served.adapter),
        is_begun=draft.is_begun,
        is_raw=draft.is_raw,
        is_compressed=is_compressed,
        budget=find_budget(request, max_tokens) if draft.mode == "thinking" else None,
        stops=stops if draft.is_raw else tuple(stop for stop in stops if stop != END_THINK),
        ends_after_thinking=draft.mode == "thinking" and END_THINK in stops,
        constraints=draft.constraints,
        top_logprobs=top_logprobs,
        num_choices=request.n or 1,
        shows_reasoning=shows_reasoning(request),
        ignored=(*find_ignored(request, able, draft.constraints), *draft.ignored),
    )


def must_be_compressed(draft: Draft, num_prompt_tokens: int) -> bool:
    """Whether `settle` will leave something out, for which it tokenises again and again."""
    is_wanted = not draft.is_raw and wants_compression(draft.request, draft.served)
    return is_wanted and num_prompt_tokens > _room(draft)


def _room(draft: Draft) -> int:
    """Tokens that a compressed prompt may have."""
    whole = draft.served.context_tokens
    asked = draft.request.max_completion_tokens or draft.request.max_tokens
    return whole - (whole // _SHARE_OF_REPLY if asked is None else asked)


def _fitted(draft: Draft, prompt_ids: list[int]) -> tuple[list[int], bool]:
    """The prompt, and whether something was left out so that it leaves room for the reply."""
    if not must_be_compressed(draft, len(prompt_ids)):
        return prompt_ids, False
    room = _room(draft)
    fitting = compress(draft.messages, lambda fewer: len(draft.encode(fewer)) <= room)
    return (draft.encode(fitting), True) if fitting else (prompt_ids, False)


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
