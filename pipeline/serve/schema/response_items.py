"""What a response is made of: items, one after another, and the events that tell of them."""

from dataclasses import dataclass, field
from typing import Literal

from pipeline.chat import Chat
from pipeline.serve.replying.events import Called, Ended, Event, Said
from pipeline.serve.schema.common import call_id, random_letters
from pipeline.serve.schema.reply import logprobs_object
from pipeline.serve.skins.skin import Body

Status = Literal["in_progress", "completed", "incomplete"]


class Items:
    """Takes a reply's events in order; streamed or not, the items are the same."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._over: list[Body] = []
        self._open: _Text | None = None

    def take(self, event: Event) -> list[Body]:
        """What a stream tells of it: events without their sequence number."""
        if isinstance(event, Called):
            return [*self._close("completed"), *self._call(event)]
        if isinstance(event, Ended):
            return self._close("incomplete" if event.finish == "length" else "completed")
        if not event.text and not event.logprobs:
            return []
        told = [] if self._is_open(event) else [*self._close("completed"), *self._begin(event)]
        assert self._open is not None
        return [*told, self._open.add(event, self._chat)]

    @property
    def all(self) -> list[Body]:
        """So far; the last one may be broken off."""
        return [*self._over, *([self._open.item("incomplete")] if self._open else [])]

    @property
    def text(self) -> str:
        """Of the whole answer."""
        messages = [item for item in self.all if item["type"] == "message"]
        return "".join(part["text"] for message in messages for part in message["content"])

    def _is_open(self, event: Said) -> bool:
        return self._open is not None and self._open.channel == event.channel

    def _begin(self, event: Said) -> list[Body]:
        self._open = _Text(event.channel, len(self._over))
        return self._open.begin()

    def _close(self, status: Status) -> list[Body]:
        if self._open is None:
            return []
        closed, self._open = self._open, None
        self._over.append(closed.item(status))
        return closed.end(status)

    def _call(self, event: Called) -> list[Body]:
        call = {"type": "function_call", "id": _item_id("fc"), "call_id": call_id()}
        call["name"] = event.call.name
        empty = {**call, "arguments": "", "status": "in_progress"}
        whole = {**call, "arguments": event.call.arguments, "status": "completed"}
        output_index = len(self._over)
        self._over.append(whole)
        place = {"item_id": call["id"], "output_index": output_index}
        arguments = "response.function_call_arguments"
        return [
            {"type": "response.output_item.added", "output_index": output_index, "item": empty},
            {"type": f"{arguments}.delta", **place, "delta": event.call.arguments},
            {
                "type": f"{arguments}.done",
                **place,
                "name": event.call.name,
                "arguments": event.call.arguments,
            },
            {"type": "response.output_item.done", "output_index": output_index, "item": whole},
        ]


@dataclass
class _Text:
    """An item of reasoning, or a message, in the making."""

    channel: Literal["reasoning", "answer"]
    output_index: int
    texts: list[str] = field(default_factory=list)
    logprobs: list[Body] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._is_answer = self.channel == "answer"
        self._id = _item_id("msg" if self._is_answer else "rs")
        self._kind = "output_text" if self._is_answer else "reasoning_text"

    def begin(self) -> list[Body]:
        """An item and its one part, both empty."""
        return [
            self._told("response.output_item.added", item=self._item([], "in_progress")),
            self._told_of_part("response.content_part.added", part=self._part),
        ]

    def add(self, event: Said, chat: Chat) -> Body:
        """The next bit."""
        self.texts.append(event.text)
        delta: Body = {"delta": event.text}
        if self._is_answer:
            delta["logprobs"] = logprobs_object(chat, event.logprobs)["content"]
            self.logprobs += delta["logprobs"]
        return self._told_of_part(f"response.{self._kind}.delta", **delta)

    def end(self, status: Status) -> list[Body]:
        """All of it once more, as a text, as a part and as an item."""
        part = self._part
        told = {name: value for name, value in part.items() if name in ("text", "logprobs")}
        return [
            self._told_of_part(f"response.{self._kind}.done", **told),
            self._told_of_part("response.content_part.done", part=part),
            self._told("response.output_item.done", item=self.item(status)),
        ]

    def item(self, status: Status) -> Body:
        """As it is so far."""
        return self._item([self._part], status)

    @property
    def _part(self) -> Body:
        part: Body = {"type": self._kind, "text": "".join(self.texts)}
        return part | ({"annotations": [], "logprobs": self.logprobs} if self._is_answer else {})

    def _item(self, content: list[Body], status: Status) -> Body:
        head = {"id": self._id, "status": status}
        if self._is_answer:
            return {"type": "message", **head, "role": "assistant", "content": content}
        # What clients send back keeps its format; of any other they drop the text.
        told = {"summary": [], "content": content, "format": "unknown"}
        return {"type": "reasoning", **head, **told}

    def _told(self, name: str, **values: object) -> Body:
        return {"type": name, "output_index": self.output_index, **values}

    def _told_of_part(self, name: str, **values: object) -> Body:
        return self._told(name, item_id=self._id, content_index=0, **values)


def _item_id(prefix: str) -> str:
    return f"{prefix}_{random_letters(24)}"
