"""What a chat request may say: the body of POST /chat/completions, read and checked."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from pipeline.errors import RequestError
from pipeline.serve.asking.faults import first_fault
from pipeline.serve.asking.nesting import is_deeper
from pipeline.serve.asking.preferences import Preferences

Effort = Literal["max", "xhigh", "high", "medium", "low", "minimal", "none"]
MAX_CHOICES = 8
MAX_DEPTH = 128
"""Of a body: somewhat more than of a schema in it."""
COMPRESSION, HEALING = "context-compression", "response-healing"
PLUGINS = (COMPRESSION, HEALING)
# They ask for nothing in the reply: hints for a cache that is automatic here, a guess of the
# answer, and two old ways to ask for the usage that is always sent.
HARMLESS = frozenset(
    ["cache_control", "prediction", "prompt_cache_options", "stream_options", "usage"]
)
UNUSED = ("top_a", "verbosity")
"""Fields whose values are checked, and that change nothing here."""
MAX_SESSION_CHARACTERS = 256

# What is read of a message, which call it answers, and a hint for the cache; by its role.
_OF_EVERY = frozenset(["role", "content", "tool_call_id", "cache_control"])
_OF_REPLIES = frozenset(["tool_calls", "reasoning", "reasoning_content", "reasoning_details"])
READ_OF_MESSAGES = dict.fromkeys(("system", "developer", "tool"), _OF_EVERY)
READ_OF_MESSAGES["user"] = _OF_EVERY | {"name"}
READ_OF_MESSAGES["assistant"] = _OF_EVERY | _OF_REPLIES


class _Part(BaseModel):
    """Strict: 1 is no string and "1" is no number. What is not declared is kept, for naming."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Text(_Part):
    type: str
    text: str | None = None


class _Function(_Part):
    name: str = Field(min_length=1)
    arguments: str | dict[str, Any] | None = None


class _Call(_Part):
    function: _Function


class _Message(_Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Text] | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class _ToolFunction(_Part):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(_Part):
    type: Literal["function"]
    function: _ToolFunction


def _checked(model: type[BaseModel]) -> WrapValidator:
    """Check a JSON object and keep it as the client wrote it: the template renders its keys."""

    def check(value: Any, as_object: ValidatorFunctionWrapHandler) -> Any:
        values = as_object(value)
        model.model_validate(values)
        return values

    return WrapValidator(check, json_schema_input_type=model)


class Reasoning(_Part):
    """OpenRouter's unified switch for thinking."""

    effort: Effort | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    exclude: bool | None = None
    enabled: bool | None = None


class TemplateArguments(_Part):
    """What engines let a client tell Qwen3's template."""

    enable_thinking: bool | None = None


class _Schema(_Part):
    name: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Part):
    """The shape asked of the answer."""

    type: Literal["text", "json_object", "json_schema", "grammar"]
    json_schema: _Schema | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "ResponseFormat":
        if self.type in ("json_schema", "grammar") and getattr(self, self.type) is None:
            raise ValueError(f"type {self.type} needs the field {self.type}")
        return self


class Debug(_Part):
    """What a stream tells of its making."""

    echo_upstream_body: bool | None = None


class _Named(_Part):
    name: str


class NamedTool(_Part):
    """The one function to be called."""

    type: Literal["function"]
    function: _Named


class Plugin(_Part):
    """Work of the server's on a request or a reply, switched on."""

    id: str
    enabled: bool | None = None

    @model_validator(mode="after")
    def _is_there(self) -> "Plugin":
        if self.enabled is not False and self.id not in PLUGINS:
            raise ValueError(f"there is no plugin {self.id!r} here; there are {', '.join(PLUGINS)}")
        return self


_Label = Annotated[str, Field(max_length=64, pattern=r"^[^\[\]]*$")]
_LabelText = Annotated[str, Field(max_length=512)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Stops = Annotated[list[str], Field(max_length=4)]
_AsStops = BeforeValidator(_as_list, json_schema_input_type=str | _Stops | None)


class ChatRequest(_Part):
    """The known fields. null is the same as absent; what is not declared is in `model_extra`."""

    messages: list[Annotated[dict[str, Any], _checked(_Message)]] | None = None
    prompt: str | None = None
    """A text to be continued as it stands, by no template."""
    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[_Stops | None, _AsStops] = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Annotated[dict[str, Any], _checked(_Tool)]] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    enable_thinking: bool | None = None
    """As of the next two: what a router may say in Qwen's own words, in place of `reasoning`."""
    thinking_budget: int | None = Field(default=None, ge=0)
    chat_template_kwargs: TemplateArguments | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: bool | None = None
    modalities: list[str] | None = None
    top_a: float | None = Field(default=None, ge=0, le=1)
    verbosity: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    service_tier: Literal["auto", "default", "fast", "flex", "priority", "scale"] | None = None
    models: list[str] | None = None
    route: Literal["fallback", "sort"] | None = None
    provider: Preferences | None = None
    plugins: list[Plugin] | None = None
    transforms: list[str] | None = None
    preset: str | None = None
    session_id: str | None = Field(default=None, max_length=MAX_SESSION_CHARACTERS)
    prompt_cache_key: str | None = None
    user: str | None = None
    metadata: Annotated[dict[_Label, _LabelText], Field(max_length=16)] | None = None
    trace: dict[str, Any] | None = None
    debug: Debug | None = None

    def has_plugin(self, name: str) -> bool:
        """Whether the request switches it on."""
        return any(
            plugin.id == name and plugin.enabled is not False for plugin in self.plugins or ()
        )


def parse_object(body: bytes) -> dict[str, Any]:
    """Read a body that is a JSON object; RequestError for any other."""
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and is_deeper(values, MAX_DEPTH):
        raise RequestError(f"the body is nested more than {MAX_DEPTH} levels deep")
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    return values


def check_request(values: Mapping[str, Any]) -> ChatRequest:
    """What a body says; RequestError names the first field that is wrong."""
    try:
        request = ChatRequest.model_validate(values)
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    except ValidationError as error:
        place, what = first_fault(error, values)
        kind = "invalid_prompt" if place.startswith("messages") else "invalid_request"
        raise RequestError(f"{place}: {what}", 400, kind) from error
    if not request.messages and request.prompt is None:
        raise RequestError('Input required: specify "prompt" or "messages"')
    return request
