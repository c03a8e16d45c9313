"""The wire format: the only place that builds what clients receive."""

from pipeline.serve.schema.common import (
    INTERNAL_ERROR,
    PROVIDER,
    error_body,
    generation_id,
    ignored_header,
)
from pipeline.serve.schema.models import models_body, supported_parameters
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
    "completion_body",
    "error_body",
    "generation_id",
    "ignored_header",
    "models_body",
    "supported_parameters",
]
