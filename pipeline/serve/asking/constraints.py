"""What a reply must look like: the tools it may or must call, and the form of its answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat import Chat
from pipeline.engine.protocol import Capability
from pipeline.errors import RequestError
from pipeline.serve.asking.grammar import (
    Function,
    Grammar,
    Tags,
    custom,
    either,
    json_object,
    json_schema,
    tool_calls,
)
from pipeline.serve.asking.request import ChatRequest, NamedTool

_FORMAT = "response_format"


@dataclass(frozen=True)
class Constraints:
    """Grammars are for the engine, as in a Sampling; None leaves it free."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    """As the client wrote them, for the prompt; none if they must not be called."""
    calls: str | None = None
    """Of what follows an opened call, to the end of the turn."""
    must_call: bool = False
    max_calls: int | None = None
    """None is any number."""
    answer: str | None = None
    """Of the whole answer, calls included where they are allowed."""
    ignored: tuple[str, ...] = ()
    """What of the schemas is not enforced."""

    @property
    def is_owed(self) -> bool:
        """Whether a reply must have an answer of some form, or a call."""
        return self.must_call or self.answer is not None

    @property
    def tool_names(self) -> frozenset[str]:
        """Whose calls are calls."""
        return frozenset(tool["function"]["name"] for tool in self.tools)


def find_constraints(request: ChatRequest, able: frozenset[Capability], chat: Chat) -> Constraints:
    """RequestError for a schema that cannot be enforced, or a choice that cannot be made."""
    choice, form = request.tool_choice, request.response_format
    tools = [] if choice == "none" else request.tools or []
    must_call = choice == "required" or isinstance(choice, NamedTool)
    if must_call and not tools:
        raise RequestError("tool_choice: a call is required, but there are no tools")
    has_form = form is not None and form.type != "text" and not must_call
    is_single = request.parallel_tool_calls is False or isinstance(choice, NamedTool)
    max_calls = 1 if is_single else None
    if "grammar" not in able:
        if must_call:
            raise _no_endpoint("the provided 'tool_choice' value.")
        if has_form:
            raise _no_endpoint(_FORMAT)
        return Constraints(tools, max_calls=max_calls)
    tags = Tags.of(chat)
    functions = _functions(tools, choice)
    calls = tool_calls(functions, tags, parallel=not is_single) if tools else None
    answer = _answer_grammar(request) if has_form else None
    if answer is not None and calls is not None:
        answer = either(answer, calls, tags)
    return Constraints(
        tools,
        calls.text if calls else None,
        must_call,
        max_calls,
        answer.text if answer else None,
        tuple(f"tools[].function.parameters.{name}" for name in (calls.ignored if calls else ())),
    )


def _functions(tools: Sequence[dict[str, Any]], choice: Any) -> list[Function]:
    """What may be called."""
    found = [
        Function(
            tool["function"]["name"],
            tool["function"].get("parameters"),
            f"tools[{index}].function.parameters",
        )
        for index, tool in enumerate(tools)
    ]
    if not isinstance(choice, NamedTool):
        return found
    named = [function for function in found if function.name == choice.function.name]
    if not named:
        raise RequestError(f"tool_choice: there is no tool {choice.function.name!r} in tools")
    return named


def _answer_grammar(request: ChatRequest) -> Grammar:
    form = request.response_format
    assert form is not None
    if form.type == "json_schema" and form.json_schema is not None:
        return json_schema(form.json_schema.schema_, f"{_FORMAT}.json_schema.schema")
    if form.type == "grammar" and form.grammar is not None:
        return custom(form.grammar, f"{_FORMAT}.grammar")
    return json_object()


def _no_endpoint(what: str) -> RequestError:
    return RequestError(f"No endpoints found that support {what}", 404, "not_found")
