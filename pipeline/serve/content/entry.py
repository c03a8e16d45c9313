"""One request and its reply as the content log has them: the same of every dialect."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat import text_of
from pipeline.errors import DataError, RequestError
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.books.ledger import Generation
from pipeline.serve.replying.events import Called, Ended, Event

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


@dataclass
class Spoken:
    """What a model has said in one choice, shown to the client or not.

    Texts, not events: of those a stream has as many as tokens, and the garbage collector looks
    at each of them again and again.
    """

    reasoning: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    calls: list[Called] = field(default_factory=list)
    end: Ended | None = None

    def add(self, event: Event) -> None:
        """What comes next."""
        if isinstance(event, Ended):
            self.end = event
        elif isinstance(event, Called):
            self.calls.append(event)
        else:
            (self.answer if event.channel == "answer" else self.reasoning).append(event.text)

    def line(self) -> Line:
        """Its finish is None if it broke off."""
        calls = [{"name": each.call.name, "arguments": each.call.arguments} for each in self.calls]
        end = self.end
        return {
            "reasoning": "".join(self.reasoning),
            "content": "".join(self.answer),
            "tool_calls": [{"type": "function", "function": call} for call in calls],
            "finish_reason": end.finish if end else None,
            "native_finish_reason": end.native_finish if end else None,
            "stop": end.stop if end else None,
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
    choices: Sequence[Spoken]
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
            "choices": [choice.line() for choice in self.choices],
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
