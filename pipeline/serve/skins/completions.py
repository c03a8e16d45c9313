"""POST /completions: a text is continued as it stands, by no template."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pipeline.errors import RequestError
from pipeline.serve.asking.request import ChatRequest, check_request
from pipeline.serve.schema.common import error_body
from pipeline.serve.schema.completions import TextWriter
from pipeline.serve.schema.reply import KEEP_ALIVE
from pipeline.serve.skins.skin import Body, Heading, Writer
from pipeline.serve.skins.strict import Strict, read_as


def _one_text(value: Any) -> Any:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a text; token ids are not read")
    if len(texts) != 1:
        raise ValueError("is continued one at a time; send a request for each text")
    return texts[0]


class CompletionsRequest(Strict):
    """What is not as in a chat."""

    prompt: Annotated[str, BeforeValidator(_one_text, json_schema_input_type=str | list[str])]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    messages: Any = None


class Completions:
    """The skin of /completions."""

    keep_alive = KEEP_ALIVE

    def read(self, values: Body) -> ChatRequest:
        """Its `logprobs` is a number: of the likeliest tokens at each place."""
        request = read_as(CompletionsRequest, values)
        if request.messages is not None:
            raise RequestError(
                "messages: only a prompt is continued; send them to /chat/completions"
            )
        given: Body = {"prompt": request.prompt}
        if request.logprobs is not None:
            given |= {"logprobs": True, "top_logprobs": request.logprobs}
        return check_request({**(request.model_extra or {}), **given})

    def writer(self, heading: Heading) -> Writer:
        """For one reply."""
        return TextWriter(heading)

    def error_body(
        self, error: RequestError, asked_models: Sequence[str], metadata: Body | None = None
    ) -> Body:
        """A failure before anything was sent."""
        return error_body(error, asked_models, metadata)
