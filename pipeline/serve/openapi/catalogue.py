"""The shapes of what is told of models, keys and use, for the description."""

from typing import Any, Literal

from pydantic import RootModel

from pipeline.serve.openapi.shape import Shape


class Architecture(Shape):
    """What goes in and what comes out."""

    modality: str
    input_modalities: list[str]
    output_modalities: list[str]
    tokenizer: str
    instruct_type: str


class Pricing(Shape):
    """USD a token, as decimal text; `request` is for each request."""

    prompt: str
    completion: str
    request: str
    image: str
    input_cache_read: str | None = None


class EndpointPricing(Pricing):
    """The same at one endpoint."""

    discount: float


class TopProvider(Shape):
    """Its bounds."""

    context_length: int
    max_completion_tokens: int
    is_moderated: bool


class ThinkingAbility(Shape):
    """How thinking can be asked for."""

    mandatory: bool
    default_enabled: bool
    supported_efforts: list[str]
    supports_max_tokens: bool


class Model(Shape):
    """A model, with the keys that clients read and those that routers read beside them."""

    id: str
    """What a request calls it."""
    canonical_slug: str
    hugging_face_id: str | None
    name: str
    created: int
    """Unix seconds."""
    description: str
    context_length: int
    """Tokens of prompt and reply together."""
    architecture: Architecture
    pricing: Pricing
    top_provider: TopProvider
    per_request_limits: None
    supported_parameters: list[str]
    """Which request fields are honoured."""
    default_parameters: dict[str, float | None]
    reasoning: ThinkingAbility
    supported_voices: None
    knowledge_cutoff: None
    expiration_date: None
    links: dict[str, str]
    object: Literal["model"]
    owned_by: str
    input_modalities: list[str]
    output_modalities: list[str]
    max_output_length: int
    quantization: str | None
    supported_sampling_parameters: list[str]
    supported_features: list[str]
    is_ready: bool
    is_free: bool
    discount_to_user: float
    deprecation_date: str | None = None
    capacity_tpm: int | None = None
    openrouter: dict[str, str] | None = None
    datacenters: list[dict[str, str]] | None = None


class NextPage(Shape):
    """Where the list goes on."""

    next: str | None


class ModelList(Shape):
    """A page of models."""

    data: list[Model]
    total_count: int
    """On all pages."""
    links: NextPage


class OneModel(Shape):
    """A model."""

    data: Model


class Count(Shape):
    """A number of models."""

    count: int


class ModelCount(Shape):
    """How many models there are."""

    data: Count


class Percentiles(Shape):
    """So many of a hundred replies were at least as good."""

    p50: float
    p75: float
    p90: float
    p99: float


class Endpoint(Shape):
    """Where a model is served. What is not measured is null."""

    name: str
    model_id: str
    model_name: str
    context_length: int
    pricing: EndpointPricing
    provider_name: str
    tag: str
    quantization: str | None
    max_completion_tokens: int
    max_prompt_tokens: None
    supported_parameters: list[str]
    status: int
    """0 is well; less is not."""
    uptime_last_5m: float | None
    """Percent of replies that no server has failed."""
    uptime_last_30m: float | None
    uptime_last_1d: float | None
    supports_implicit_caching: bool
    supports_voice_cloning: bool
    supports_diarization: bool
    supports_tool_choice: dict[str, bool]
    latency_last_30m: Percentiles | None
    """Milliseconds to the first token, as the next one only for who sends a key."""
    throughput_last_30m: Percentiles | None
    """Tokens a second."""
    native_tools: dict[str, Any]
    service_tier: None


class EndpointList(Shape):
    """Endpoints of all models."""

    data: list[Endpoint]


class ModelWithEndpoints(Shape):
    """A model and where it is served."""

    id: str
    name: str
    created: int
    description: str
    architecture: Architecture
    endpoints: list[Endpoint]


class EndpointsOfModel(Shape):
    """Where one model is served."""

    data: ModelWithEndpoints


class Provider(Shape):
    """Who serves."""

    name: str
    slug: str
    privacy_policy_url: None
    terms_of_service_url: None
    status_page_url: None
    headquarters: None
    datacenters: None


class ProviderList(Shape):
    """Who serves the models here."""

    data: list[Provider]


class ModelsForRouters(Shape):
    """Models by version 2.4 of the schema for providers."""

    data: list[dict[str, Any]]


class Status(Shape):
    """How the server is."""

    status: str


class Document(RootModel[dict[str, Any]]):
    """An OpenAPI document."""


class Text(RootModel[str]):
    """Lines of text."""


class Page(RootModel[str]):
    """HTML."""
