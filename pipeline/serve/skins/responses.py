"""POST /responses: OpenAI's Responses, without any state between requests."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from pipeline.errors import RequestError
from pipeline.serve.asking.request import ChatRequest, check_request
from pipeline.serve.schema.responses import COMMENT, ResponseWriter, response_error_body
from pipeline.serve.skins.responses_input import read_input
from pipeline.serve.skins.skin import Body, Heading, Writer
from pipeline.serve.skins.strict import Strict, read_as

_LOGPROBS = "message.output_text.logprobs"
_OF_FUNCTIONS = ("name", "description", "parameters", "strict")
_TRANSFORMS = {"auto": ["middle-out"], "disabled": []}


def _only_functions(kind: str) -> str:
    if kind != "function":
        raise ValueError(f"{kind!r} is not available here; tools are of type 'function'")
    return kind


_Function = Annotated[str, AfterValidator(_only_functions)]


class _Tool(Strict):
    type: _Function
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def for_chat(self) -> Body:
        return {"type": "function", "function": _given(self, *_OF_FUNCTIONS)}


class _Named(Strict):
    type: _Function
    name: str


class _Allowed(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[_Named]


class _Format(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, pattern="^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _is_complete(self) -> "_Format":
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise ValueError("type json_schema needs the fields name and schema")
        return self

    @property
    def for_chat(self) -> Body:
        if self.type != "json_schema":
            return {"type": self.type}
        form = _given(self, "name", "description", "strict")
        return {"type": self.type, "json_schema": {**form, "schema": self.schema_}}


class _Text(Strict):
    format: _Format | None = None
    verbosity: Literal["low", "medium", "high", "xhigh", "max"] | None = None


_Input = Annotated[
    Any, WithJsonSchema({"type": ["string", "array", "null"], "items": {"type": "object"}})
]


class ResponsesRequest(Strict):
    """What /chat/completions has not, or has under another name."""

    input: _Input = None
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    tools: list[_Tool] | None = None
    tool_choice: Any = None
    text: _Text | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    messages: Any = None
    n: int | None = None


class Responses:
    """The skin of /responses."""

    keep_alive = COMMENT

    def read(self, values: Body) -> ChatRequest:
        """What is not this dialect's own is as in a chat."""
        request = read_as(ResponsesRequest, values)
        _refuse(request, values)
        messages = read_input(request.input)
        if request.instructions is not None:
            messages.insert(0, {"role": "system", "content": request.instructions})
        text = request.text or _Text()
        choice, tools = _choice(request.tool_choice, request.tools)
        chat: Body = {
            "messages": messages,
            "max_completion_tokens": request.max_output_tokens,
            "tools": tools and [tool.for_chat for tool in tools],
            "tool_choice": choice,
            "response_format": text.format and text.format.for_chat,
            "verbosity": text.verbosity,
            "transforms": request.truncation and _TRANSFORMS[request.truncation],
            **_logprobs(request),
        }
        given = {name: value for name, value in chat.items() if value is not None}
        return check_request({**(request.model_extra or {}), **given})

    def writer(self, heading: Heading) -> Writer:
        """For one reply."""
        return ResponseWriter(heading)

    def error_body(
        self, error: RequestError, asked_models: Sequence[str], metadata: Body | None = None
    ) -> Body:
        """A failure before anything was sent."""
        return response_error_body(error, asked_models, metadata)


def _given(model: Strict, *names: str) -> Body:
    values = ((name, getattr(model, name)) for name in names)
    return {name: value for name, value in values if value is not None}


def _refuse(request: ResponsesRequest, values: Body) -> None:
    """What cannot be left out without answering another question than the client's."""
    if request.store:
        raise RequestError("store: nothing is stored here; leave it out and send all of the input")
    if request.background:
        raise RequestError("background: a response is not kept for later; leave it out")
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(request, name) is not None:
            raise RequestError(f"{name}: nothing is stored here; send all of it as input")
    if request.messages is not None:
        raise RequestError("messages: they are the input of a response; send them as input")
    if request.n not in (None, 1):
        raise RequestError("n: a response is one reply; ask for each of them")
    try:
        # The response repeats some of it, and its writer does not go as deep as the reader.
        orjson.dumps([[{name: value for name, value in values.items() if name != "input"}]])
    except TypeError as error:
        raise RequestError("the body is nested too deeply") from error


def _choice(choice: Any, tools: list[_Tool] | None) -> tuple[Any, list[_Tool] | None]:
    """A chat's choice, and the tools that it leaves."""
    if choice is None or choice in ("auto", "none", "required"):
        return choice, tools
    if not isinstance(choice, dict):
        raise RequestError(
            "tool_choice: must be auto, none, required, or a function's name in an object"
        )
    if choice.get("type") != "allowed_tools":
        named = read_as(_Named, choice, "tool_choice")
        return {"type": "function", "function": {"name": named.name}}, tools
    allowed = read_as(_Allowed, choice, "tool_choice")
    names = [tool.name for tool in allowed.tools]
    missing = set(names) - {tool.name for tool in tools or ()}
    if missing:
        raise RequestError(f"tool_choice.tools: there is no tool {min(missing)!r} in tools")
    return allowed.mode, [tool for tool in tools or () if tool.name in names]


def _logprobs(request: ResponsesRequest) -> Body:
    include = request.include or []
    others = [name for name in include if name != _LOGPROBS]
    is_wanted = _LOGPROBS in include or bool(request.top_logprobs)
    return {
        "logprobs": is_wanted or None,
        "top_logprobs": request.top_logprobs if is_wanted else None,
        "include": others or None,
    }
