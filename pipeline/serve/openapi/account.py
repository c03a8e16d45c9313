"""The shapes of what is told of a key and of its use, for the description."""

from typing import Any

from pydantic import Field

from pipeline.serve.books.allowance import Priority
from pipeline.serve.openapi.shape import Shape


class RateLimit(Shape):
    """Says nothing: there is none."""

    requests: int
    interval: str
    note: str


class Use(Shape):
    """What a key has used, in USD: in all, and since a UTC day, week and month began."""

    usage: float
    usage_daily: float
    usage_weekly: float
    usage_monthly: float
    byok_usage: float
    byok_usage_daily: float
    byok_usage_weekly: float
    byok_usage_monthly: float


class KeyData(Use):
    """A key; what does not apply here is null or 0."""

    label: str
    """Enough of its text to tell it from others."""
    limit: float | None
    limit_remaining: float | None
    limit_reset: str | None
    is_free_tier: bool
    is_management_key: bool
    is_provisioning_key: bool
    include_byok_in_limit: bool
    creator_user_id: None
    expires_at: str | None
    rate_limit: RateLimit
    allowed_data_regions: list[str]
    budgets: list[dict[str, Any]]
    effective_budget: None
    free_model_daily_requests: dict[str, int]
    organization_id: None
    workspace_id: None


class KeyAnswer(Shape):
    """The key that has asked."""

    data: KeyData


class ManagedKey(Use):
    """A key as those are told who manage keys; what does not apply here is null or 0."""

    hash: str
    """SHA-256 of its text: what names it in a path."""
    name: str
    label: str
    disabled: bool
    limit: float | None
    """USD."""
    limit_remaining: float | None
    limit_reset: str | None
    include_byok_in_limit: bool
    created_at: str
    updated_at: str | None
    expires_at: str | None
    last_used_at: str | None
    creator_user_id: None
    external_user: None
    workspace_id: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    streams: int | None
    priority: Priority | None
    """Requests at the same time."""
    models: list[str] | None
    """The only ones that it may ask."""
    is_management_key: bool
    log_content: bool
    """Whether requests and replies are kept, word by word."""


class ManagedKeys(Shape):
    """Oldest first."""

    data: list[ManagedKey]


class OneManagedKey(Shape):
    """As it is now."""

    data: ManagedKey


class NewManagedKey(Shape):
    """A key that was made."""

    data: ManagedKey
    key: str
    """Its text, which nobody can ask for again."""


class Deleted(Shape):
    """What was used with it stays in the books."""

    deleted: bool


class CreditsData(Shape):
    """USD."""

    total_credits: float
    total_usage: float


class Credits(Shape):
    """What was bought and what was used."""

    data: CreditsData


class GenerationData(Shape):
    """A reply in the books; what is not counted here is null."""

    id: str
    created_at: str
    model: str
    provider_name: str
    total_cost: float
    """USD."""
    usage: float
    upstream_inference_cost: float
    is_byok: bool
    tokens_prompt: int
    tokens_completion: int
    native_tokens_prompt: int
    native_tokens_completion: int
    native_tokens_completion_images: int
    native_tokens_reasoning: int
    native_tokens_cached: int
    provider_responses: list[dict[str, Any]]
    api_type: str
    data_region: str
    streamed: bool
    cancelled: bool
    latency: int
    """Milliseconds, as of the next."""
    generation_time: int | None
    finish_reason: str | None
    native_finish_reason: str | None
    origin: str
    http_referer: str | None
    external_user: str | None
    session_id: str | None
    user_agent: str | None
    preset_id: str | None
    response_cache_source_id: str | None
    app_id: None
    cache_discount: None
    moderation_latency: None
    num_fetches: None
    num_input_audio_prompt: None
    num_media_completion: None
    num_media_prompt: None
    num_search_results: None
    request_id: None
    router: None
    service_tier: None
    upstream_id: None
    web_search_engine: None
    workspace_id: None


class Generation(Shape):
    """What is known of one reply."""

    data: GenerationData


class ContentInput(Shape):
    """What was asked, as chat/completions has it whichever dialect it came in."""

    messages: list[dict[str, Any]] = Field(default_factory=list)
    prompt: str = ""
    """In place of messages, a text that was continued."""


class ContentOutput(Shape):
    """What the model said."""

    completion: str | None
    reasoning: str | None
    tool_calls: list[dict[str, Any]] = Field(default_factory=list)


class ContentError(Shape):
    """Why it broke off."""

    message: str | None
    status: int | None
    provider_name: str | None
    previous_errors: list[dict[str, Any]]
    raw: None


class ContentData(Shape):
    """A request and its reply."""

    input: ContentInput
    output: ContentOutput
    error: ContentError | None


class Content(Shape):
    """What was kept of one reply."""

    data: ContentData


class DayOfModel(Shape):
    """What was asked of one model on one day."""

    date: str
    model: str
    model_permaslug: str
    endpoint_id: str
    provider_name: str
    usage: float
    """USD."""
    byok_usage_inference: float
    requests: int
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int


class Activity(Shape):
    """An item for each day and model."""

    data: list[DayOfModel]
