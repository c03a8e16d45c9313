"""Records to samples: which format a record is written in, and what it says in it."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from pipeline.chat import Message
from pipeline.data.conversation import (
    Conversation,
    Document,
    Pair,
    Record,
    Sample,
    check_messages,
    fault_of,
    is_trained,
)
from pipeline.data.fields import (
    read_list,
    read_messages,
    read_optional_text,
    read_text,
    read_tools,
    read_turns,
)
from pipeline.data.strict_json import parse_json
from pipeline.errors import DataError
from pipeline.recipe import Format

_KEYS: dict[Format, tuple[str, ...]] = {  # in the order in which they are looked for
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "preference": ("chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_MAX_KEY_CHARACTERS = 50


def detect(record: Record) -> Format:
    """The format a record is written in, by the keys it has; raises DataError at its place."""
    try:
        fields = _read_fields(record.value)
        form = _find_format(fields)
        if form is None:
            known = "; ".join(f"{form} ({', '.join(keys)})" for form, keys in _KEYS.items())
            raise DataError(
                f"{_describe(fields)}, which is no known format: {known}; see data.sources[].format"
            )
    except DataError as error:
        raise fault_of(record, error) from error
    return form


def parse(record: Record, form: Format) -> Sample:
    """What a record says in a format; raises DataError at its place.

    messages: OpenAI's, with `tools` or the older `functions`, role `function` and `function_call`.
    sharegpt: `conversations` of from and value, or role and content; `system`; `tools`.
    alpaca: `instruction` and `input` are one user turn, joined by a line end as LLaMA-Factory does,
    `output` its answer; `history` holds earlier questions and answers, which are learnt too.
    prompt_completion: each is text or messages; of messages only the completion's are learnt.
    preference: `chosen` and `rejected` are text or messages that continue `prompt`, or two whole
    conversations that part where the prompt ends.
    text: a document. Lists may be given as their JSON text, as a cell of a CSV file must.
    """
    try:
        return _parse(record, form)
    except DataError as error:
        raise fault_of(record, error) from error
    except RecursionError as error:
        raise fault_of(record, "it is nested too deeply") from error


def _parse(record: Record, form: Format) -> Sample:
    fields = _read_fields(record.value)
    _check_format(fields, form)
    if form == "text":
        return Document(read_text(fields, "text"), record.path, record.line)
    tools = read_tools(fields)
    if form == "preference":
        prompt, chosen, rejected = _read_pair(fields)
        return Pair(prompt, tools, chosen, rejected, record.path, record.line)
    match form:
        case "messages":
            messages = read_messages(fields, "messages")
        case "sharegpt":
            messages = _read_sharegpt(fields)
        case "alpaca":
            messages = _read_alpaca(fields)
        case "prompt_completion":
            messages = _read_prompt_completion(fields)
    if not any(message["role"] == "assistant" and is_trained(message) for message in messages):
        raise DataError("there is no assistant turn to learn from")
    return Conversation(messages, tools, record.path, record.line)


def _read_fields(value: Any) -> dict[str, Any]:
    """The record's keys that have a value."""
    if not isinstance(value, dict):
        raise DataError('a record must be a JSON object such as {"messages": [...]}')
    return {key: item for key, item in value.items() if item is not None}


def _find_format(fields: dict[str, Any]) -> Format | None:
    return next((form for form, keys in _KEYS.items() if all(key in fields for key in keys)), None)


def _check_format(fields: dict[str, Any], form: Format) -> None:
    if all(key in fields for key in _KEYS[form]):
        return
    other = _find_format(fields)
    if other:
        raise DataError(f"this is {other}, but the source is read as {form}; name two sources")
    missing = " and ".join(key for key in _KEYS[form] if key not in fields)
    raise DataError(f"{_describe(fields)}; {form} needs {missing}")


def _describe(fields: dict[str, Any]) -> str:
    names = ", ".join(fields)
    if len(names) > _MAX_KEY_CHARACTERS:
        names = f"{names[:_MAX_KEY_CHARACTERS]} …"
    only = next(iter(fields.values())) if len(fields) == 1 else None
    if isinstance(only, list) and only and isinstance(only[0], dict):
        return f"it has the key {names} alone, around a list; let the file be that list"
    return f"it has the keys {names}" if fields else "it has no key with a value"


def _read_sharegpt(fields: dict[str, Any]) -> tuple[Message, ...]:
    turns: list[Message] = []
    for index, item in enumerate(read_list(fields, "conversations")):
        if not isinstance(item, dict):
            raise DataError(f"conversations {index} is not a JSON object")
        role = item.get("from", item.get("role"))
        if role == "function_call":
            _add_calls(index, item, turns)
        elif isinstance(role, str) and role in _SHAREGPT_ROLES:
            turns.append(_turn_of(item, _SHAREGPT_ROLES[role]))
        else:
            known = ", ".join(_SHAREGPT_ROLES)
            raise DataError(f"conversations {index}: from {role!r} is none of {known}")
    messages = check_messages(turns)
    system = read_optional_text(fields, "system")
    if not system.strip():
        return messages
    if messages[0]["role"] != "system":
        return ({"role": "system", "content": system}, *messages)
    if messages[0]["content"] != system:
        raise DataError("system stands twice, beside conversations and in it; keep one")
    return messages


def _turn_of(item: dict[str, Any], role: str) -> Message:
    """One turn; what else the item has, such as train, weight or reasoning, is kept."""
    content = item.get("value", item.get("content"))
    rest = {key: value for key, value in item.items() if key not in ("from", "value")}
    return rest | {"role": role, "content": content}


def _add_calls(index: int, item: dict[str, Any], turns: list[Message]) -> None:
    """A call joins the assistant turn it follows: the model says and calls in one turn."""
    turn = _turn_of(item, "assistant")
    calls = turn.pop("content")
    if isinstance(calls, str):
        try:
            calls = parse_json(calls)
        except DataError as error:
            raise DataError(f"conversations {index}: a function_call is {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    if turns and turns[-1]["role"] == "assistant":
        turn = turns.pop() | turn
    before = turn.get("tool_calls") or []
    if not calls or not isinstance(before, list):
        raise DataError(f"conversations {index}: a function_call must be a call or a list of calls")
    turn["tool_calls"] = [*before, *({"type": "function", "function": _bare(c)} for c in calls)]
    turns.append(turn)


def _bare(call: Any) -> Any:
    return call.get("function", call) if isinstance(call, dict) else call


def _read_alpaca(fields: dict[str, Any]) -> tuple[Message, ...]:
    messages: list[Message] = []
    system = read_optional_text(fields, "system")
    if system.strip():
        messages.append({"role": "system", "content": system})
    parts = [read_optional_text(fields, key) for key in ("instruction", "input")]
    question = "\n".join(part for part in parts if part.strip())
    if not question:
        raise DataError("instruction is blank")
    answer = read_text(fields, "output")
    for asked, answered in [*_read_history(fields), (question, answer)]:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    return check_messages(messages)


def _read_history(fields: dict[str, Any]) -> Iterator[list[str]]:
    for index, pair in enumerate(read_list(fields, "history") if fields.get("history") else ()):
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise DataError(f"history {index} must be a question and its answer, both text")
        yield pair


def _read_prompt_completion(fields: dict[str, Any]) -> tuple[Message, ...]:
    prompt = read_turns(fields, "prompt", "user")
    completion = read_turns(fields, "completion", "assistant")
    _check_parts(prompt, completion, "completion")
    context = ({**m, "train": False} if m["role"] == "assistant" else m for m in prompt)
    return (*context, *completion)


def _read_pair(
    fields: dict[str, Any],
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Prompt, chosen and rejected. Whole conversations hold their prompt themselves."""
    chosen = read_turns(fields, "chosen", "assistant")
    rejected = read_turns(fields, "rejected", "assistant")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same")
    are_answers = chosen[0]["role"] == rejected[0]["role"] == "assistant"
    if are_answers and "prompt" not in fields:
        raise DataError("preference needs prompt where chosen and rejected are answers alone")
    if are_answers:
        prompt = read_turns(fields, "prompt", "user")
    else:
        both = zip(chosen, rejected, strict=False)
        size = len(list(takewhile(lambda pair: pair[0] == pair[1], both)))
        prompt, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
    _check_parts(prompt, chosen, "chosen")
    _check_parts(prompt, rejected, "rejected")
    return prompt, chosen, rejected


def _check_parts(prompt: tuple[Message, ...], answer: tuple[Message, ...], key: str) -> None:
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise DataError(f"the prompt before {key} must end with a user or tool turn")
    if not answer or answer[0]["role"] != "assistant":
        raise DataError(f"{key} must go on with an assistant turn after the prompt")
