"""The wire format: the only place that builds what clients receive."""

from pipeline.serve.schema.account import activity_body, credits_body, generation_body, key_body
from pipeline.serve.schema.common import (
    INTERNAL_ERROR,
    PROVIDER,
    error_body,
    generation_id,
    ignored_header,
)
from pipeline.serve.schema.endpoints import all_endpoints_body, endpoints_body, providers_body
from pipeline.serve.schema.models import (
    count_body,
    model_body,
    model_document,
    models_body,
    supported_parameters,
)
from pipeline.serve.schema.reply import (
    DONE,
    KEEP_ALIVE,
    Completion,
    Heading,
    completion_body,
)

__all__ = [
    "DONE",
    "INTERNAL_ERROR",
    "KEEP_ALIVE",
    "PROVIDER",
    "Completion",
    "Heading",
    "activity_body",
    "all_endpoints_body",
    "completion_body",
    "count_body",
    "credits_body",
    "endpoints_body",
    "error_body",
    "generation_body",
    "generation_id",
    "ignored_header",
    "key_body",
    "model_body",
    "model_document",
    "models_body",
    "providers_body",
    "supported_parameters",
]
