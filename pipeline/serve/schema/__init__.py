"""The wire format: the only place that builds what clients receive."""

from pipeline.serve.schema.account import (
    activity_body,
    content_body,
    credits_body,
    generation_body,
    key_body,
    managed_key,
)
from pipeline.serve.schema.common import (
    INTERNAL_ERROR,
    INTERNAL_STATUS,
    PROVIDER,
    error_body,
    generation_id,
    ignored_header,
)
from pipeline.serve.schema.models import count_body, model_body, model_document, models_body
from pipeline.serve.schema.provider import provider_models_body
from pipeline.serve.schema.reply import KEEP_ALIVE, ChatWriter
from pipeline.serve.schema.supported import PARAMETERS, supported_parameters

__all__ = [
    "INTERNAL_ERROR",
    "INTERNAL_STATUS",
    "KEEP_ALIVE",
    "PARAMETERS",
    "PROVIDER",
    "ChatWriter",
    "activity_body",
    "content_body",
    "count_body",
    "credits_body",
    "error_body",
    "generation_body",
    "generation_id",
    "ignored_header",
    "key_body",
    "managed_key",
    "model_body",
    "model_document",
    "models_body",
    "provider_models_body",
    "supported_parameters",
]
