"""What a chat request may say: the body of POST /chat/completions, read and checked."""

from typing import Annotated, Any, Literal, NoReturn

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from pipeline.errors import RequestError

Effort = Literal["max", "xhigh", "high", "medium", "low", "minimal", "none"]
MAX_CHOICES = 8
# They ask for nothing in the reply: labels for the books, hints for a cache that is automatic
# here, a guess of the answer, and two old ways to ask for the usage that is always sent.
HARMLESS = frozenset(
    [
        "cache_control",
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "session_id",
        "stream_options",
        "trace",
        "usage",
        "user",
    ]
)

# What is read of a message, which call it answers, and a hint for the cache; by its role.
_OF_EVERY = frozenset(["role", "content", "tool_call_id", "cache_control"])
_OF_REPLIES = frozenset(["tool_calls", "reasoning", "reasoning_content", "reasoning_details"])
READ_OF_MESSAGES = dict.fromkeys(("system", "developer", "user", "tool"), _OF_EVERY)
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


class _ToolFunction(_Part):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(_Part):
    type: Literal["function"]
    function: _ToolFunction


def _checked(model: type[BaseModel]) -> AfterValidator:
    """Check a JSON object and keep it as the client wrote it: the template renders its keys."""

    def check(value: dict[str, Any]) -> dict[str, Any]:
        model.model_validate(value)
        return value

    return AfterValidator(check)


class Reasoning(_Part):
    """OpenRouter's unified switch for thinking."""

    effort: Effort | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    exclude: bool | None = None
    enabled: bool | None = None


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


class _Named(_Part):
    name: str


class NamedTool(_Part):
    """The one function to be called."""

    type: Literal["function"]
    function: _Named


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ChatRequest(_Part):
    """The known fields. null is the same as absent; what is not declared is in `model_extra`."""

    messages: list[Annotated[dict[str, Any], _checked(_Message)]] | None = None
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
    stop: Annotated[list[str] | None, BeforeValidator(_as_list)] = Field(default=None, max_length=4)
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
    response_format: ResponseFormat | None = None
    structured_outputs: bool | None = None
    modalities: list[str] | None = None


def parse_object(body: bytes) -> dict[str, Any]:
    """Read a body that is a JSON object; RequestError for any other."""
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    return values


def parse_request(body: bytes) -> ChatRequest:
    """Read a body; RequestError names the first field that is wrong."""
    values = parse_object(body)
    try:
        request = ChatRequest.model_validate(values)
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    except ValidationError as error:
        _refuse(error)
    if not request.messages:
        raise RequestError('Input required: specify "messages"')
    return request


def _refuse(error: ValidationError) -> NoReturn:
    fault = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    what = fault["msg"].removeprefix("Value error, ")
    kind = "invalid_prompt" if place.startswith("messages") else "invalid_request"
    raise RequestError(f"{place}: {what}", 400, kind) from error
