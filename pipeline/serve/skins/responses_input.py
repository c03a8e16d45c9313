"""The input of /responses, a list of items, as the messages of a chat."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.errors import RequestError
from pipeline.serve.skins.strict import Strict, read_as

Message = dict[str, Any]
_TEXTS = ("input_text", "output_text", "text", "refusal")
# What /chat/completions calls them; neither is read here, and it says so.
_OTHERS = {"input_image": "image_url", "input_file": "file"}
_PROMPT = "invalid_prompt"


def _as_parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("must be a text or a list of parts")
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


class _Part(Strict):
    type: str
    text: str | None = None
    refusal: str | None = None

    @property
    def for_chat(self) -> Message:
        if self.type in _TEXTS:
            return {"type": "text", "text": self.text or self.refusal or ""}
        return {"type": _OTHERS.get(self.type, self.type)}


_Parts = Annotated[list[_Part], BeforeValidator(_as_parts)]


class _Said(Strict):
    role: Literal["user", "assistant", "system", "developer"]
    content: _Parts


class _Call(Strict):
    call_id: str
    name: str = Field(min_length=1)
    arguments: str


class _Answered(Strict):
    call_id: str
    output: _Parts


def read_input(value: Any) -> list[Message]:
    """RequestError for what no chat can be made of; reasoning is never the reason."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if value is not None and not isinstance(value, list):
        raise RequestError("input: must be a text or a list of items", 400, _PROMPT)
    conversation = _Conversation()
    for index, item in enumerate(value or ()):
        conversation.add(item, f"input.{index}")
    messages = conversation.finish()
    if not messages:
        raise RequestError('Input required: specify "input"')
    return messages


class _Conversation:
    """Items of one reply, as they follow one another, become one message."""

    def __init__(self) -> None:
        self._messages: list[Message] = []

    def add(self, item: Any, place: str) -> None:
        if not isinstance(item, dict):
            raise RequestError(f"{place}: must be an object", 400, _PROMPT)
        kind = item.get("type") or "message"
        if kind == "message":
            self._say(read_as(_Said, item, place, _PROMPT))
        elif kind == "reasoning":
            self._think(_thought(item))
        elif kind == "function_call":
            self._call(read_as(_Call, item, place, _PROMPT))
        elif kind == "function_call_output":
            answered = read_as(_Answered, item, place, _PROMPT)
            parts = [part.for_chat for part in answered.output]
            message = {"role": "tool", "tool_call_id": answered.call_id, "content": parts}
            self._messages.append(message)
        else:
            raise RequestError(
                f"{place}.type: {kind!r} is not read here; send message, reasoning, "
                "function_call or function_call_output",
                400,
                _PROMPT,
            )

    def finish(self) -> list[Message]:
        """All messages; a thought that nothing came of is none."""
        for message in self._messages:
            message["content"] = _flat(message["content"])
        return [m for m in self._messages if m["content"] is not None or "tool_calls" in m]

    def _say(self, said: _Said) -> None:
        parts = [part.for_chat for part in said.content]
        if said.role != "assistant":
            self._messages.append({"role": said.role, "content": parts})
            return
        reply = self._reply()
        if reply["content"] is not None and "tool_calls" not in reply:
            reply = self._new_reply()
        reply["content"] = (reply["content"] or []) + parts

    def _think(self, text: str) -> None:
        if not text:
            return
        reply = self._reply()
        if reply["content"] is not None or "tool_calls" in reply:
            reply = self._new_reply()
        reply["reasoning"] = reply.get("reasoning", "") + text

    def _call(self, call: _Call) -> None:
        function = {"name": call.name, "arguments": call.arguments}
        calls = self._reply().setdefault("tool_calls", [])
        calls.append({"id": call.call_id, "type": "function", "function": function})

    def _reply(self) -> Message:
        """That the last item was part of, or a new one."""
        last = self._messages[-1] if self._messages else {}
        return last if last.get("role") == "assistant" else self._new_reply()

    def _new_reply(self) -> Message:
        self._messages.append({"role": "assistant", "content": None})
        return self._messages[-1]


def _flat(parts: list[Message] | None) -> str | list[Message] | None:
    """A text, unless there is more in it than text."""
    if parts is None or any(part["type"] != "text" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _thought(item: Message) -> str:
    """The text of a reasoning item, whatever else is in it: a summary is not what was thought."""
    content = item.get("content")
    return "".join(
        part["text"]
        for part in (content if isinstance(content, list) else ())
        if isinstance(part, dict)
        and part.get("type") == "reasoning_text"
        and isinstance(part.get("text"), str)
    )
