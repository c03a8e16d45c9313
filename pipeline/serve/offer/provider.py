"""What a router that lists a model is told beside what the model can do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Listing:
    """Of one model. What is None was not said, and nobody is told of it."""

    openrouter_slug: str | None = None
    """What OpenRouter calls the model: qwen/qwen3-8b."""
    is_ready: bool = True
    """False keeps it hidden, or hides it again."""
    country_code: str | None = None
    """Where the machine stands: US, DE, … of ISO 3166-1."""
    region: str | None = None
    """The same by the name that whoever runs the machine has for it: us-east-1."""
    zdr: bool | None = None
    """Whether no word of a request is kept."""
    hipaa: bool | None = None
    deprecation_date: str | None = None
    """YYYY-MM-DD or YYYY-MM-DDTHH:00:00Z."""
    discount: float = 0.0
    """Off the price, below 1: 0.2 is a fifth."""
    prompt_tokens_per_minute: int | None = None
    """What the machine can take, as of the next three."""
    completion_tokens_per_minute: int | None = None
    requests_per_minute: int | None = None
    concurrency: int | None = None
    """Requests at once."""
    privacy_policy_url: str | None = None
    """Of whoever runs the server, as of the next."""
    terms_of_service_url: str | None = None


UNLISTED = Listing()
