"""A request as far as it can be decided before its prompt is tokenised."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from pipeline.chat import Mode
from pipeline.errors import Availability, DataError, RequestError
from pipeline.serve.asking.constraints import Constraints, find_constraints
from pipeline.serve.asking.reasoning import find_mode
from pipeline.serve.asking.request import COMPRESSION, ChatRequest
from pipeline.serve.offer.catalog import Served

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
_SHORT_BYTES, _SHORT_ITEMS = 8192, 32
_SHORT_CONTEXT_TOKENS = 8192
_KINDS = {
    "image_url": "image",
    "input_audio": "audio",
    "video_url": "video",
    "input_video": "video",
}
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Draft:
    """What is known of an order without the length of its prompt."""

    request: ChatRequest
    served: Served
    messages: Messages = field(default_factory=list)
    """As the template takes them; none where a text is to be continued."""
    mode: Mode = "direct"
    is_begun: bool = False
    """Whether the last message is the beginning of the answer."""
    constraints: Constraints = field(default_factory=Constraints)

    @property
    def is_raw(self) -> bool:
        """Whether the prompt is a text to be continued: no dialogue, no thought, no call."""
        return not self.messages

    @property
    def ignored(self) -> list[str]:
        """Names of what means something in a dialogue alone, where this is none."""
        request = self.request
        names = _OF_DIALOGUE if self.is_raw else ()
        return [name for name in names if getattr(request, name) is not None]

    def render(self, messages: Messages) -> Sequence[str]:
        """The prompt as texts for `Chat.encode`, each to be encoded apart from the others."""
        chat, tools = self.served.chat, self.constraints.tools
        if self.is_raw:
            return [chat.verbatim(self.request.prompt or "")]
        try:
            if self.is_begun:
                return chat.begun(messages, tools)
            return [chat.render(messages, tools, self.mode)]
        except DataError as error:
            raise RequestError(f"messages: {error}", 400, "invalid_prompt") from error
        except RecursionError as error:
            raise RequestError("the body is nested too deeply") from error

    def encode(self, messages: Messages) -> list[int]:
        """The prompt's ids."""
        return [i for text in self.render(messages) for i in self.served.chat.encode(text)]


def make_draft(request: ChatRequest, served: Served) -> Draft:
    """RequestError, with its status, for what is refused whatever the prompt's length is."""
    _refuse_unsupported(request)
    if not request.messages:
        if not request.prompt:
            raise RequestError("prompt: it is empty; there is nothing to continue")
        return Draft(request, served)
    is_begun = _is_begun(request.messages)
    mode = "direct" if is_begun else find_mode(request)
    constraints = find_constraints(request, served.engine.capabilities, served.chat)
    if is_begun and constraints.is_owed:
        raise RequestError(
            "messages: an answer that has begun can be held to no form and to no call; "
            "leave out the last message, or response_format and tool_choice",
            error_type="invalid_prompt",
        )
    messages = [under_its_name(message) for message in request.messages]
    return Draft(request, served, messages, mode, is_begun, constraints)


def is_short(request: ChatRequest) -> bool:
    """Whether all but its tokenising is done in a millisecond or two, and that in a few."""
    if request.tools or request.response_format:  # schemas may take long, whatever their size
        return False
    lists = (request.messages, request.logit_bias, request.transforms, request.plugins)
    if sum(len(items or ()) for items in (*lists, request.model_extra)) > _SHORT_ITEMS:
        return False
    return len(orjson.dumps([request.prompt, request.messages])) <= _SHORT_BYTES


def wants_compression(request: ChatRequest, served: Served) -> bool:
    """Whether messages may be left out for want of room: the request's word, else the model's.

    OpenRouter compresses by default for contexts this short. It turns an error into an answer to
    less than was asked, so here the operator must say so.
    """
    said = [plugin for plugin in request.plugins or () if plugin.id == COMPRESSION]
    if said or request.transforms is not None:
        return request.has_plugin(COMPRESSION) or "middle-out" in (request.transforms or ())
    return served.compress_short and served.context_tokens <= _SHORT_CONTEXT_TOKENS


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


def _is_begun(messages: Messages) -> bool:
    """Whether the last message is the beginning of the answer, to be continued."""
    if messages[-1].get("role") != "assistant":
        return False
    if messages[-1].get("tool_calls"):
        raise RequestError(
            "messages: the last message calls tools; answer it with messages of role tool",
            error_type="invalid_prompt",
        )
    return True


def under_its_name(message: dict[str, Any]) -> dict[str, Any]:
    """A user's name goes before what the user says: the template has no place for it."""
    name, content = message.get("name"), message.get("content")
    if message["role"] != "user" or not name:
        return message
    mark = f"{name}: "
    parts = [{"type": "text", "text": mark}, *content] if isinstance(content, list) else None
    return {**message, "content": parts or mark + (content or "")}
