"""A reply as Anthropic's Messages API has it: a stream of blocks, or one whole message."""

import json
from collections.abc import Sequence
from typing import Any

import orjson

from pipeline.errors import RequestError
from pipeline.serve.offer.price import Cost, usd_number
from pipeline.serve.replying.events import Called, Ended, Event, Said, Usage
from pipeline.serve.schema.common import beside, error_body, random_letters
from pipeline.serve.skins.skin import Bill, Body, Heading

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_EMPTY: dict[str, Body] = {
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
    "text": {"type": "text", "text": "", "citations": None},
}
_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
_ERROR_TYPES = {
    "authentication": "authentication_error",
    "not_found": "not_found_error",
    "payment_required": "billing_error",
    "permission_denied": "permission_error",
    "provider_overloaded": "overloaded_error",
    "rate_limit_exceeded": "rate_limit_error",
    "timeout": "timeout_error",
}


class MessageWriter:
    """A Writer. Blocks follow one another as the events do, each of one kind."""

    def __init__(self, heading: Heading) -> None:
        self._heading = heading
        self._blocks: list[Body] = []
        """Of a whole message."""
        self._num_blocks = 0
        """Begun in a stream."""
        self._open: str | None = None
        """The kind of the block that a stream is in."""
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    def begin(self, echo: Body | None) -> bytes:
        """The empty message; an echo stands beside it, as there is no event for that."""
        usage = message_usage(Usage(self._heading.num_prompt_tokens))
        message = {"message": self._message([], usage)}
        debug = {} if echo is None else {"debug": {"echo_upstream_body": echo}}
        return _frame("message_start", **message, **debug) + PING

    def frames(self, index: int, event: Event) -> bytes:  # noqa: ARG002 - one choice, always 0
        """An event; a block is closed once its successor, or the end, is known."""
        if isinstance(event, Ended):
            self._end(event)
            return self._close()
        if isinstance(event, Called):
            arguments = {"type": "input_json_delta", "partial_json": event.call.arguments}
            return b"".join(
                [self._close(), self._start(_call(event, {})), self._delta(arguments), self._stop()]
            )
        if not event.text:
            return b""
        kind = _kind(event)
        begun = b"" if kind == self._open else self._close() + self._start(_EMPTY[kind])
        self._open = kind
        return begun + self._delta({"type": f"{kind}_delta", kind: event.text})

    def finish(self, bill: Bill) -> bytes:
        """Usage is cumulative, the prompt's included."""
        delta = {
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "stop_details": None,
            "container": None,
        }
        usage = message_usage(bill.usage, bill.cost)
        end = _frame("message_delta", delta=delta, usage=usage)
        return self._close() + end + _frame("message_stop", **beside(bill.metadata))

    def fail(self, error: RequestError, bill: Bill) -> bytes:
        """Nothing follows it; the block it broke stays open."""
        body = message_error_body(error, (), bill.metadata) | {"request_id": self._heading.id}
        return b"event: error\ndata: " + orjson.dumps(body) + b"\n\n"

    def add(self, index: int, event: Event) -> None:  # noqa: ARG002 - one choice, always 0
        """Take an event of a whole message."""
        if isinstance(event, Ended):
            self._end(event)
        elif isinstance(event, Called):
            self._blocks.append(_call(event, json.loads(event.call.arguments)))
        elif event.text:
            kind = _kind(event)
            if not self._blocks or self._blocks[-1]["type"] != kind:
                self._blocks.append(dict(_EMPTY[kind]))
            self._blocks[-1][kind] += event.text

    def body(self, bill: Bill, error: RequestError | None) -> Body:
        """A message that broke has no reason to have stopped, and an error beside it."""
        body = self._message(self._blocks, message_usage(bill.usage, bill.cost))
        if error is not None:
            body["error"] = _error_object(error, ())
        return body | beside(bill.metadata)

    def _end(self, event: Ended) -> None:
        is_stop = event.stop is not None and event.finish == "stop"
        self._stop_reason = "stop_sequence" if is_stop else _STOP_REASONS[event.finish]
        self._stop_sequence = event.stop if is_stop else None

    def _message(self, blocks: list[Body], usage: Body) -> Body:
        return {
            "id": self._heading.id,
            "type": "message",
            "role": "assistant",
            "model": self._heading.model,
            "provider": self._heading.provider,
            "container": None,
            "content": blocks,
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "stop_details": None,
            "usage": usage,
        }

    def _start(self, block: Body) -> bytes:
        self._num_blocks += 1
        return _frame("content_block_start", index=self._num_blocks - 1, content_block=block)

    def _delta(self, delta: Body) -> bytes:
        return _frame("content_block_delta", index=self._num_blocks - 1, delta=delta)

    def _stop(self) -> bytes:
        return _frame("content_block_stop", index=self._num_blocks - 1)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        is_thinking, self._open = self._open == "thinking", None
        signature = {"type": "signature_delta", "signature": ""}
        return (self._delta(signature) if is_thinking else b"") + self._stop()


def message_usage(usage: Usage, cost: Cost | None = None) -> Body:
    """Tokens and their cost, if that is known; what was cached is no part of `input_tokens`."""
    body: Body = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "inference_geo": None,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "server_tool_use": None,
        "service_tier": "standard",
    }
    if cost is None:
        return body
    return body | {
        "cost": usd_number(cost.total),
        "cost_details": {
            "upstream_inference_cost": usd_number(cost.total),
            "upstream_inference_prompt_cost": usd_number(cost.prompt),
            "upstream_inference_completions_cost": usd_number(cost.completion),
        },
        "is_byok": False,
    }


def message_error_body(
    error: RequestError, asked_models: Sequence[str] = (), metadata: Body | None = None
) -> Body:
    """A failure before anything was sent."""
    error_object = _error_object(error, asked_models)
    return {"type": "error", "error": error_object, "request_id": None, **beside(metadata)}


def _error_object(error: RequestError, asked_models: Sequence[str]) -> Body:
    # Anthropic has fewer words: what is none of them is the client's mistake or ours.
    otherwise = "invalid_request_error" if error.status < 500 else "api_error"
    body = {
        "type": _ERROR_TYPES.get(error.error_type, otherwise),
        "message": str(error),
        "error_type": error.error_type,
    }
    availability = error_body(error, asked_models)["error"].get("availability")
    return body if availability is None else body | {"availability": availability}


def _kind(event: Said) -> str:
    return "thinking" if event.channel == "reasoning" else "text"


def _call(event: Called, arguments: Any) -> Body:
    return {
        "type": "tool_use",
        "id": "toolu_" + random_letters(24),
        "name": event.call.name,
        "input": arguments,
        "caller": {"type": "direct"},
    }


def _frame(kind: str, **fields: Any) -> bytes:
    data = orjson.dumps({"type": kind, **fields})
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)
