"""A reply, however it came."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.serve.probes.client import Body
from pipeline.serve.probes.seen import Fault

FINISHES = ("stop", "length", "tool_calls", "content_filter", "error")


@dataclass(frozen=True)
class Choice:
    """One of what was answered."""

    text: str
    reasoning: str
    calls: Sequence[tuple[str, str]]
    """Names, and arguments as they were written."""
    finish: str | None
    logprobs: Sequence[Body] | None
    """One for each token of the text; None where there are none at all."""


@dataclass(frozen=True)
class Reply:
    """All of them, and what they have used."""

    model: Any
    choices: Sequence[Choice]
    usage: Any

    @property
    def first(self) -> Choice:
        """The only one, mostly."""
        return self.choices[0]

    @property
    def num_tokens(self) -> int:
        """Of the completion."""
        return count(self.usage, "completion_tokens")

    @property
    def num_reasoning_tokens(self) -> int:
        """Of it; 0 where that is not told."""
        details = (self.usage or {}).get("completion_tokens_details") or {}
        return int(details.get("reasoning_tokens") or 0)


def read_reply(body: Body) -> Reply:
    """Of a reply that was not streamed; Fault for what it lacks."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        raise Fault("a reply has no choices")
    return Reply(body.get("model"), [_choice(choice) for choice in choices], body.get("usage"))


def count(usage: Any, name: str) -> int:
    """A number of a usage; Fault if it is not there."""
    value = usage.get(name) if isinstance(usage, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Fault(f"usage.{name} is {value!r}")
    return value


def check_usage(usage: Any) -> str:
    """What it says in short; Fault for one that does not add up."""
    if not isinstance(usage, dict):
        raise Fault(f"usage is {usage!r}")
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    prompt, completion, total = (count(usage, name) for name in names)
    if not prompt or not completion:
        raise Fault(f"{prompt} tokens of a prompt and {completion} of a completion are counted")
    if prompt + completion != total:
        raise Fault(f"{prompt} and {completion} tokens are {total} in all")
    return f"{prompt} + {completion} tokens"


def _choice(choice: Any) -> Choice:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Fault("a choice has no message")
    return Choice(
        message.get("content") or "",
        message.get("reasoning") or message.get("reasoning_content") or "",
        [read_call(call) for call in message.get("tool_calls") or ()],
        choice.get("finish_reason"),
        read_logprobs(choice),
    )


def read_call(call: Any) -> tuple[str, str]:
    """Its name and arguments; Fault for one that has them not."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type") != "function":
        raise Fault("a tool call is no function")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise Fault("a tool call has no name, or its arguments are no text")
    return name, arguments


def read_logprobs(choice: Mapping[str, Any]) -> list[Body] | None:
    """Of the tokens of a choice, or of a bit of it."""
    logprobs = choice.get("logprobs")
    return (logprobs.get("content") or []) if isinstance(logprobs, dict) else None
