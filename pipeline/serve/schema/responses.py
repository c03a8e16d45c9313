"""A reply as /responses has it: events of a stream, or one whole response."""

import time
from collections.abc import Sequence
from typing import Any

import orjson

from pipeline.errors import RequestError
from pipeline.serve.offer.price import usd_number
from pipeline.serve.replying.events import Ended, Event
from pipeline.serve.schema.common import beside, error_body
from pipeline.serve.schema.reply import DONE
from pipeline.serve.schema.response_items import Items
from pipeline.serve.skins.skin import Bill, Body, Heading

COMMENT = b":\n\n"
_TOO_LONG = ("context_length_exceeded", "max_tokens_exceeded", "token_limit_exceeded")
_CODES = {
    "rate_limit_exceeded": "rate_limit_exceeded",
    "invalid_prompt": "invalid_prompt",
    "invalid_request": "invalid_prompt",
    "string_too_long": "invalid_prompt",
}
# What a response repeats of its request, and what stands there if the client has not said it.
_DEFAULTS: Body = {
    "instructions": None,
    "metadata": None,
    "parallel_tool_calls": True,
    "temperature": None,
    "top_p": None,
    "presence_penalty": None,
    "frequency_penalty": None,
    "tool_choice": "auto",
    "max_output_tokens": None,
    "max_tool_calls": None,
    "top_logprobs": 0,
    "truncation": "disabled",
    "safety_identifier": None,
    "prompt_cache_key": None,
    "user": None,
}


class ResponseWriter:
    """A Writer of the one choice that a response is."""

    def __init__(self, heading: Heading) -> None:
        self._heading = heading
        self._items = Items(heading.chat)
        self._num_told = 0
        self._is_cut = False

    def begin(self, echo: Body | None) -> bytes:
        """The engine's order, if it is wanted, and an empty response, twice."""
        response = self._response("in_progress", [])
        told = [
            {"type": f"response.{name}", "response": response}
            for name in ("created", "in_progress")
        ]
        if echo is not None:
            debug = {"echo_upstream_body": echo}
            told.insert(0, {"type": "response.debug", "debug": debug})
        return COMMENT + self._frames(told)

    def frames(self, index: int, event: Event) -> bytes:
        """An event of the reply."""
        return self._frames(self._take(index, event))

    def finish(self, bill: Bill) -> bytes:
        """The whole response once more."""
        return self._ending(self.body(bill, None))

    def fail(self, error: RequestError, bill: Bill) -> bytes:
        """What there was of the response; the item it broke in has no end of its own."""
        return self._ending(self.body(bill, error))

    def add(self, index: int, event: Event) -> None:
        """Take an event of a whole response."""
        self._take(index, event)

    def body(self, bill: Bill, error: RequestError | None) -> Body:
        """A reply that became too long is incomplete; one that broke has failed."""
        status = self._status(error)
        response = self._response(status, self._items.all)
        response["output_text"] = self._items.text
        response["usage"] = _usage(bill)
        if status == "completed":
            response["completed_at"] = max(int(time.time()), self._heading.created)
        elif error is not None and status == "failed":
            code = _CODES.get(error.error_type, "server_error")
            response["error"] = {"code": code, "message": str(error)}
            response["error_type"] = error.error_type
        else:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response | beside(bill.metadata)

    def _status(self, error: RequestError | None) -> str:
        if error is not None and error.error_type not in _TOO_LONG:
            return "failed"
        return "incomplete" if self._is_cut or error is not None else "completed"

    def _take(self, index: int, event: Event) -> list[Body]:
        if index:  # a preset may ask for more choices than a response has
            return []
        if isinstance(event, Ended):
            self._is_cut = event.finish == "length"
        return self._items.take(event)

    def _response(self, status: str, output: list[Body]) -> Body:
        """With every key a client may look for."""
        return {
            "id": self._heading.id,
            "object": "response",
            "created_at": self._heading.created,
            "completed_at": None,
            "model": self._heading.model,
            "status": status,
            "output": output,
            "error": None,
            "incomplete_details": None,
            **_echo(self._heading.values),
            "background": False,
            "previous_response_id": None,
            "service_tier": None,
            "store": False,
            "usage": None,
        }

    def _ending(self, response: Body) -> bytes:
        event = {"type": f"response.{response['status']}", "response": response}
        return self._frames([event]) + DONE

    def _frames(self, told: list[Body]) -> bytes:
        frames = b""
        for event in told:
            event["sequence_number"] = self._num_told
            frames += b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))
            self._num_told += 1
        return frames


def response_error_body(
    error: RequestError, asked_models: Sequence[str], metadata: Body | None = None
) -> Body:
    """A failure before anything was sent: its type stands outside, too."""
    return {**error_body(error, asked_models, metadata), "error_type": error.error_type}


def _echo(values: Any) -> Body:
    """What of the request a response repeats."""
    given = {name: values.get(name) for name in _DEFAULTS}
    said = {name: value for name, value in given.items() if value is not None}
    text = {name: value for name, value in (values.get("text") or {}).items() if value is not None}
    effort = (values.get("reasoning") or {}).get("effort")
    tools = [{"parameters": None, "strict": None, **tool} for tool in values.get("tools") or ()]
    return {
        **_DEFAULTS,
        **said,
        "tools": tools,
        "text": {"format": {"type": "text"}, **text},
        "reasoning": {"effort": effort, "summary": None},  # none is made
    }


def _usage(bill: Bill) -> Body:
    usage, cost = bill.usage, bill.cost
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "cost": usd_number(cost.total),
        "cost_details": {
            "upstream_inference_cost": usd_number(cost.total),
            "upstream_inference_input_cost": usd_number(cost.prompt),
            "upstream_inference_output_cost": usd_number(cost.completion),
        },
        "is_byok": False,
    }
