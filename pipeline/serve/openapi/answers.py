"""The shapes of replies, for the description: the writers in `schema` make them."""

from typing import Any, Literal

from pydantic import RootModel

from pipeline.serve.openapi.errors import ErrorObject, MessagesErrorObject
from pipeline.serve.openapi.shape import Shape

Finish = Literal["stop", "length", "tool_calls", "content_filter", "error"]


class PromptDetails(Shape):
    """Of the prompt's tokens."""

    cached_tokens: int
    cache_write_tokens: int
    audio_tokens: int
    video_tokens: int


class CompletionDetails(Shape):
    """Of the reply's tokens."""

    reasoning_tokens: int
    image_tokens: int
    audio_tokens: int


class CostDetails(Shape):
    """USD."""

    upstream_inference_cost: float
    upstream_inference_prompt_cost: float
    upstream_inference_completions_cost: float


class Usage(Shape):
    """Tokens, by the model's own tokenizer, and what they cost."""

    prompt_tokens: int
    completion_tokens: int
    """Reasoning included."""
    total_tokens: int
    cost: float
    """USD."""
    is_byok: bool
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    cost_details: CostDetails


class Function(Shape):
    """What is called."""

    name: str
    arguments: str
    """JSON."""


class ToolCall(Shape):
    """A call, which the client answers in a message of role tool."""

    index: int
    id: str
    type: Literal["function"]
    function: Function


class ReasoningDetail(Shape):
    """To be sent back unchanged with the message that it came in."""

    type: Literal["reasoning.text"]
    text: str
    format: str
    index: int


class AssistantMessage(Shape):
    """The reply."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning: str | None
    reasoning_details: list[ReasoningDetail] | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(Shape):
    """One of `n` replies."""

    index: int
    message: AssistantMessage
    finish_reason: Finish
    native_finish_reason: str
    logprobs: dict[str, Any] | None
    error: ErrorObject | None = None
    """Only of a reply that broke off."""


class ChatCompletion(Shape):
    """A whole reply."""

    id: str
    """For /generation, and in the header X-Generation-Id, too."""
    object: Literal["chat.completion"]
    created: int
    """Unix seconds."""
    model: str
    """The one that answered."""
    provider: str
    """Who answered."""
    system_fingerprint: None
    service_tier: None
    choices: list[Choice]
    usage: Usage
    openrouter_metadata: dict[str, Any] | None = None
    """With the header X-OpenRouter-Metadata."""


class ChunkChoice(Shape):
    """The next bit of one of `n` replies."""

    index: int
    delta: dict[str, Any]
    """`content`, `reasoning` and `reasoning_details`, or `tool_calls`."""
    finish_reason: Finish | None
    native_finish_reason: str | None
    logprobs: dict[str, Any] | None = None


class ChatChunk(Shape):
    """An event of a stream. The last one before [DONE] has the usage and no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    provider: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    error: ErrorObject | None = None
    """Of a reply that broke off."""
    debug: dict[str, Any] | None = None
    openrouter_metadata: dict[str, Any] | None = None


class TextChoice(Shape):
    """How a text goes on; in a stream, the next bit of it."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Finish | None
    native_finish_reason: str | None
    error: ErrorObject | None = None


class TextCompletion(Shape):
    """A continued text, or an event of a stream of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    provider: str
    choices: list[TextChoice]
    usage: Usage | None = None
    error: ErrorObject | None = None
    debug: dict[str, Any] | None = None
    openrouter_metadata: dict[str, Any] | None = None


class ChatAnswer(RootModel[ChatCompletion | TextCompletion]):
    """The latter of a request with a prompt in place of messages."""


class ChatEvent(RootModel[ChatChunk | TextCompletion]):
    """The same of a stream."""


class Message(Shape):
    """A reply in Anthropic's form."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    provider: str
    content: list[dict[str, Any]]
    """Blocks of type thinking, text and tool_use."""
    stop_reason: Literal["end_turn", "max_tokens", "tool_use"] | None
    stop_sequence: None
    stop_details: None
    container: None
    usage: dict[str, Any]
    error: MessagesErrorObject | None = None
    openrouter_metadata: dict[str, Any] | None = None


class MessageEvent(Shape):
    """An event of a stream, in Anthropic's form: message_start, …, message_stop."""

    type: str


class Response(Shape):
    """A reply in the form of OpenAI's Responses, and what of the request it repeats."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: list[dict[str, Any]]
    """Items of type reasoning, message and function_call."""
    output_text: str
    usage: dict[str, Any] | None
    error: dict[str, Any] | None
    error_type: str | None = None
    incomplete_details: dict[str, Any] | None
    openrouter_metadata: dict[str, Any] | None = None
    instructions: str | None
    metadata: dict[str, str] | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    reasoning: dict[str, Any]
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    top_logprobs: int
    truncation: str
    prompt_cache_key: str | None
    user: str | None
    service_tier: None
    max_tool_calls: Any
    """As it was sent, as of the next."""
    safety_identifier: Any
    background: bool
    store: bool
    previous_response_id: None


class ResponseEvent(Shape):
    """An event of a stream: response.created, …, response.completed."""

    type: str
    sequence_number: int
