"""What a body of POST /messages may say, where chat/completions says it in other words."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from pipeline.serve.asking.request import HARMLESS, Effort
from pipeline.serve.skins.strict import Strict

MAX_STOPS = 4
# Hints for a cache, and what a reply of ours carries for form's sake and gets handed back.
_HARMLESS = HARMLESS | {"caller", "citations"}


class Text(Strict):
    """A block of text."""

    type: Literal["text"]
    text: str


class Thinking(Strict):
    """What an assistant has thought; nobody here signs it."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinking(Strict):
    """A thought that only its author can read."""

    type: Literal["redacted_thinking"]
    data: str | None = None


class ToolUse(Strict):
    """A call."""

    type: Literal["tool_use"]
    id: str
    name: str = Field(min_length=1)
    input: dict[str, Any]


class ToolResult(Strict):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: "ResultContent | None" = None
    is_error: bool | None = None


class OtherBlock(BaseModel):
    """A block of a kind that a text model cannot read: an image, a document."""

    model_config = ConfigDict(strict=True)

    type: str


_ROLES = {
    "redacted_thinking": "assistant",
    "thinking": "assistant",
    "tool_result": "user",
    "tool_use": "assistant",
}
"""Of the messages that a block may stand in; others may stand in any."""
_OTHER = "<other>"


def _tag(block: dict[str, Any]) -> str:
    """In angles, so that it is not taken for a part of a field's path."""
    kind = block.get("type")
    return f"<{kind}>" if kind in ("text", *_ROLES) else _OTHER


def _tag_in_result(block: dict[str, Any]) -> str:
    return "<text>" if block.get("type") == "text" else _OTHER


def _as_blocks(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list) and all(isinstance(block, dict) for block in value):
        return value
    raise ValueError("Input should be a string or a list of blocks")


Block = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[Thinking, Tag("<thinking>")]
    | Annotated[RedactedThinking, Tag("<redacted_thinking>")]
    | Annotated[ToolUse, Tag("<tool_use>")]
    | Annotated[ToolResult, Tag("<tool_result>")]
    | Annotated[OtherBlock, Tag(_OTHER)],
    Discriminator(_tag),
]
ResultBlock = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[OtherBlock, Tag(_OTHER)],
    Discriminator(_tag_in_result),
]
Content = Annotated[
    list[Block], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])
]
ResultContent = Annotated[
    list[ResultBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[ResultBlock])
]
SystemContent = Annotated[
    list[Text], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Text])
]


class Message(Strict):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: Content

    @model_validator(mode="after")
    def _is_in_place(self) -> "Message":
        for index, block in enumerate(self.content):
            role = _ROLES.get(block.type, self.role)
            if role != self.role:
                raise ValueError(
                    f"content.{index} is a block {block.type}, which belongs into a message of "
                    f"role {role}"
                )
        return self


def _run_by_the_client(kind: str | None) -> str | None:
    if kind not in (None, "custom"):
        raise ValueError(f"no tool {kind!r} is run here; send tools of type custom")
    return kind


class Tool(Strict):
    """A function of the client's."""

    type: Annotated[str | None, AfterValidator(_run_by_the_client)] = None
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Strict):
    """Whether tools are called, and which."""

    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "ToolChoice":
        if self.type == "tool" and self.name is None:
            raise ValueError("type tool needs the field name")
        return self


class ThinkingConfig(Strict):
    """Whether a reply is thought about, and whether that is shown."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _has_its_budget(self) -> "ThinkingConfig":
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise ValueError("type enabled needs the field budget_tokens, and no other type has it")
        return self


class OutputFormat(Strict):
    """The shape asked of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """How long to think, and what to answer in."""

    effort: Effort | None = None
    format: OutputFormat | None = None


class Metadata(Strict):
    """Labels."""

    user_id: str | None = None


class Fallback(BaseModel):
    """Another model to ask."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str


def _as_many_as_taken(stops: list[str]) -> list[str]:
    if len(stops) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} are taken here, not {len(stops)}; send fewer")
    return stops


class MessagesRequest(Strict):
    """The fields to be translated; all others are in `model_extra`, under chat's own names."""

    messages: list[Message] = Field(min_length=1)
    system: SystemContent | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    stop_sequences: Annotated[list[str], AfterValidator(_as_many_as_taken)] | None = None
    metadata: Metadata | None = None
    fallbacks: list[Fallback] | None = Field(default=None, max_length=3)


def unread(part: Strict, path: str = "") -> Iterator[str]:
    """Paths of what was given inside the translated fields and is not declared there."""
    for name in type(part).model_fields:
        value = getattr(part, name)
        is_list = isinstance(value, list)
        place = f"{path}{name}{'[]' if is_list else ''}."
        for item in value if is_list else [value]:
            if isinstance(item, Strict):
                given = {
                    key for key, extra in (item.model_extra or {}).items() if extra is not None
                }
                yield from (place + key for key in sorted(given - _HARMLESS))
                yield from unread(item, place)
