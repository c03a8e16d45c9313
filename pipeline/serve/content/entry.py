"""One request and its reply as the content log has them: the same of every dialect."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.chat import text_of
from pipeline.errors import DataError, RequestError
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.books.ledger import Generation
from pipeline.serve.replying.choices import Indexed
from pipeline.serve.replying.events import Called, Ended, Said

Line = dict[str, Any]
"""An entry as JSON has it."""
_ASKED = {"messages", "prompt", "tools", "response_format"}
_SETTINGS = {
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "logit_bias"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("max_tokens", "max_completion_tokens", "tool_choice", "parallel_tool_calls"),
    *("reasoning", "reasoning_effort", "include_reasoning"),
    *("enable_thinking", "thinking_budget", "chat_template_kwargs"),
}


@dataclass(frozen=True)
class Entry:
    """What is known once a reply has been booked."""

    generation: Generation
    key_hash: str
    path: str
    """That it was asked by: the dialect."""
    request: ChatRequest
    """With what a preset has put beneath it."""
    events: Sequence[Indexed]
    """All that came, shown to the client or not."""
    error: RequestError | None

    def line(self) -> Line:
        """Lists and dicts of its own, so that whoever redacts it may change them."""
        generation, request = self.generation, self.request
        asked = request.model_dump(include=_ASKED, exclude_none=True, by_alias=True)
        if "messages" in asked:
            asked["messages"] = [_flat(message) for message in asked["messages"]]
        return {
            "id": generation.id,
            "key": self.key_hash,
            "created_ms": generation.created_ms,
            "model": generation.model,
            "provider": generation.provider,
            "dialect": self.path.strip("/").rpartition("v1/")[2],
            **asked,
            "settings": request.model_dump(include=_SETTINGS, exclude_none=True, by_alias=True),
            "choices": [_choice(self.events, index) for index in range(request.n or 1)],
            "cancelled": generation.cancelled,
            "error": self._error(),
        }

    def _error(self) -> Line | None:
        if self.error is None:
            return None
        said = {"message": str(self.error), "type": self.error.error_type}
        return {**said, "status": self.error.status}


def _flat(message: Line) -> Line:
    """Parts of a text become that text; a server elsewhere may have been sent other parts."""
    with contextlib.suppress(DataError):
        if isinstance(message.get("content"), list):
            return {**message, "content": text_of(message["content"])}
    return message


def _choice(events: Sequence[Indexed], wanted: int) -> Line:
    """The finish is None of one that broke off."""
    said: dict[str, list[str]] = {"reasoning": [], "answer": []}
    calls: list[Line] = []
    end: Ended | None = None
    for index, event in events:
        if index != wanted:
            continue
        match event:
            case Said(channel, text):
                said[channel].append(text)
            case Called(_, call):
                function = {"name": call.name, "arguments": call.arguments}
                calls.append({"type": "function", "function": function})
            case Ended():
                end = event
    return {
        "reasoning": "".join(said["reasoning"]),
        "content": "".join(said["answer"]),
        "tool_calls": calls,
        "finish_reason": end.finish if end else None,
        "native_finish_reason": end.native_finish if end else None,
        "stop": end.stop if end else None,
    }
