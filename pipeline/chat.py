"""The only file that knows Qwen3's dialogue: conversation to turns, text to reasoning and answer.

Training, evaluation and serving all render and parse here, so they cannot differ. Nothing here
needs torch or transformers: the checkpoint's own template runs in Jinja2's sandbox, its own
tokenizer in `tokenizers`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from pipeline.errors import BaseError, DataError

Mode = Literal["thinking", "direct"]
Message = dict[str, Any]
END_OF_TURN = "<|im_end|>"
THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
TAGS = (THINK, END_THINK, CALL, END_CALL)
ROLES = ("system", "user", "assistant", "tool")

# A literal control token inside a message must stay ordinary text. It travels through the template
# as ESCAPE plus one character that says which literal it is, and becomes ordinary ids afterwards.
_ESCAPE = "\U0010fffd"
_FIRST_CODE = 0xE000


@dataclass(frozen=True)
class Turn:
    """One trained assistant turn: what the model is given, and what it must emit."""

    prompt: str
    completion: str
    """Through <|im_end|>, which is its last token."""
    prompt_ids: list[int]
    completion_ids: list[int]
    index: int
    """The assistant message's place in the conversation."""
    mode: Mode


class Chat:
    """A checkpoint's dialogue: its `chat_template.jinja` and its `tokenizer.json`."""

    def __init__(self, folder: Path) -> None:
        """Read both files; raises BaseError naming the one that is missing or unreadable."""
        self.tokenizer = _load_tokenizer(folder / "tokenizer.json")
        self.template = _compile(template_text(folder))
        added = self.tokenizer.get_added_tokens_decoder()
        self._literals = [_ESCAPE, *(token.content for token in added.values())]
        self._literal_pattern = re.compile("|".join(re.escape(t) for t in self._literals))
        # Cut after its first character no literal is matched whole: none of these ids is control.
        self._literal_ids = [self._encode(t[:1]) + self._encode(t[1:]) for t in self._literals]
        self.end_of_turn_id = self.token_id(END_OF_TURN)

    def token_id(self, token: str) -> int:
        """The id of one token of the vocabulary; BaseError if it is not a single token."""
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise BaseError(
                f"the tokenizer has no token {token}; this is not a Qwen3 dialogue model"
            )
        return int(token_id)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, mode: Mode | None
    ) -> str:
        """The official template's text; `mode` asks for the generation prompt in that mode.

        Literal control tokens of the messages are still escaped in it: `show` gives readable text.
        """
        try:
            return self.template.render(
                messages=[self._escape(prepare_message(message)) for message in messages],
                tools=self._escape(list(tools)) if tools else None,
                add_generation_prompt=mode is not None,
                enable_thinking=mode != "direct",
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"the template cannot express these messages: {error}") from error

    def encode(self, rendered: str) -> list[int]:
        """Ids of a rendered text; control tokens of the template are single ids."""
        ids: list[int] = []
        first, *rest = rendered.split(_ESCAPE)
        ids += self._encode(first)
        for piece in rest:
            ids += self._literal_ids[ord(piece[0]) - _FIRST_CODE]
            ids += self._encode(piece[1:])
        return ids

    def show(self, rendered: str) -> str:
        """A rendered text with its literals put back: for people, never for encoding."""
        return re.sub(
            f"{_ESCAPE}(.)", lambda m: self._literals[ord(m[1]) - _FIRST_CODE], rendered, flags=re.S
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens visible."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, mode: Mode
    ) -> list[int]:
        """What an engine is asked to continue."""
        return self.encode(self.render(messages, tools, mode))

    def turns(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Iterator[Turn]:
        """Each assistant turn as inference would meet it (design law 1).

        The prompt is the official render of everything before the turn, with the generation prompt
        of the turn's own mode: thinking if it has reasoning, else direct. The completion is what
        the official render of the turn adds to that. A turn before any user turn is context only.
        Raises DataError where the template's text does not begin with its own prompt.
        """
        asked = False
        for index, message in enumerate(messages):
            asked = asked or message["role"] == "user"
            if message["role"] != "assistant" or not asked:
                continue
            mode: Mode = "thinking" if reasoning_of(message).strip() else "direct"
            prompt = self.render(messages[:index], tools, mode)
            full = self.render(messages[: index + 1], tools, None)
            if not full.startswith(prompt):
                raise DataError(f"message {index}: the template does not continue its own prompt")
            completion, end, _ = full[len(prompt) :].partition(END_OF_TURN)
            completion += end
            yield Turn(
                self.show(prompt),
                self.show(completion),
                self.encode(prompt),
                self.encode(completion),
                index,
                mode,
            )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _escape(self, value: Any) -> Any:
        """Escape every literal control token in every string of a JSON-like value."""
        if isinstance(value, str):
            return self._literal_pattern.sub(
                lambda match: _ESCAPE + chr(_FIRST_CODE + self._literals.index(match[0])), value
            )
        if isinstance(value, Mapping):
            return {self._escape(key): self._escape(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._escape(item) for item in value]
        return value


def prepare_message(message: Message) -> Message:
    """An OpenAI-shaped message as the template needs it.

    Content parts are joined and null becomes empty (the template would render both as nothing,
    silently); reasoning is always a string, so the template never cuts the answer at a literal
    `</think>`; call arguments are objects wherever they parse, so one call has one spelling.
    """
    role = "system" if message["role"] == "developer" else message["role"]
    prepared: Message = {"role": role, "content": text_of(message.get("content"))}
    if role != "assistant":
        return prepared
    # Blank reasoning is none: the template would write it into the block of a direct turn.
    reasoning = reasoning_of(message)
    prepared["reasoning_content"] = reasoning if reasoning.strip() else ""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    if calls:
        prepared["tool_calls"] = [
            {"function": {"name": call["name"], "arguments": _arguments(call.get("arguments"))}}
            for call in calls
        ]
    return prepared


def text_of(content: Any) -> str:
    """A message's content as one string; raises DataError for a part that is not text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"content must be text, not {type(content).__name__}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"content part {kind!r} is not text")
    return "".join(str(part.get("text") or "") for part in content)


def reasoning_of(message: Message) -> str:
    """An assistant message's reasoning, whichever of the known fields carries it, or ""."""
    details = message.get("reasoning_details")
    if isinstance(details, list):
        texts = [
            item["text"]
            for item in details
            if isinstance(item, dict)
            and item.get("type") == "reasoning.text"
            and isinstance(item.get("text"), str)
        ]
        if texts:
            return "".join(texts)
    for name in ("reasoning", "reasoning_content"):
        if isinstance(message.get(name), str):
            return str(message[name])
    return ""


def _arguments(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except ValueError:
            return arguments
        return parsed if isinstance(parsed, dict) else arguments
    return {} if arguments is None else arguments


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise BaseError(f"{path} is missing: a checkpoint needs its tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception for every fault of the file
        raise BaseError(f"{path} is not a tokenizer: {error}") from error


def template_text(folder: Path) -> str:
    """A checkpoint's chat template, wherever it keeps it; BaseError if it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"  # where transformers 4 kept it
    template = json.loads(config.read_text("utf-8")).get("chat_template") if config.is_file() else 0
    if not isinstance(template, str):
        raise BaseError(f"{path} is missing: a checkpoint needs its chat template")
    return template


def _compile(template: str) -> jinja2.Template:
    """Compile as transformers' `apply_chat_template` does; a test holds the two equal."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise BaseError(f"the chat template is not Jinja: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


Channel = Literal["reasoning", "answer", "call"]


@dataclass(frozen=True)
class Piece:
    """A bit of a reply: text of one channel. A call comes whole, as its JSON object's text."""

    channel: Channel
    text: str


class Splitter:
    """Cut a reply's text into reasoning, answer and calls, however the text is chunked.

    Tags never appear in a piece: what may be the beginning of one is held back. The template's own
    line breaks around the blocks are taken off, so pieces join to what the template was given.
    """

    def __init__(self, mode: Mode) -> None:
        self._channel: Channel = "answer"
        self._may_think = mode == "thinking"
        self._buffer = ""
        self._at_start = True

    def feed(self, text: str) -> list[Piece]:
        """Take the next text of the reply, give what is certain."""
        self._buffer += text
        pieces: list[Piece] = []
        while (found := self._next_tag()) is not None:
            before, tag = found
            self._emit(pieces, before.rstrip("\n") if before else "")
            self._switch(tag)
        if self._channel != "call":
            keep = _held_back(self._buffer)
            certain, self._buffer = (
                self._buffer[: len(self._buffer) - keep],
                self._buffer[len(self._buffer) - keep :],
            )
            self._emit(pieces, certain)
        return pieces

    def finish(self) -> list[Piece]:
        """The reply has ended: give what was held back."""
        rest, self._buffer = self._buffer, ""
        pieces: list[Piece] = []
        # An unfinished call is no call; its text would be half a JSON object to the client.
        if self._channel != "call":
            self._emit(pieces, rest)
        return pieces

    def _next_tag(self) -> tuple[str, str] | None:
        wanted = (END_CALL,) if self._channel == "call" else TAGS
        places = [(self._buffer.find(tag), tag) for tag in wanted if tag in self._buffer]
        if not places:
            return None
        place, tag = min(places)
        before = self._buffer[:place]
        self._buffer = self._buffer[place + len(tag) :]
        return before, tag

    def _switch(self, tag: str) -> None:
        if tag == THINK:
            self._channel = "reasoning" if self._may_think else "answer"
        elif tag == CALL:
            self._channel = "call"
        else:
            self._channel = "answer"
            self._may_think = self._may_think and tag != END_THINK
        self._at_start = True

    def _emit(self, pieces: list[Piece], text: str) -> None:
        if self._at_start:
            text = text.lstrip("\n")
        if text:
            self._at_start = False
            pieces.append(Piece(self._channel, text))


def _held_back(buffer: str) -> int:
    """How many last characters may be line breaks before a tag, or the beginning of a tag."""
    tag_part = max(
        (size for tag in TAGS for size in range(1, len(tag)) if buffer.endswith(tag[:size])),
        default=0,
    )
    before = buffer[: len(buffer) - tag_part]
    return tag_part + len(before) - len(before.rstrip("\n"))


@dataclass(frozen=True)
class ToolCall:
    """One call the model asks for; `arguments` is a JSON object's text."""

    name: str
    arguments: str


def parse_call(text: str) -> ToolCall | None:
    """A call from the text between its tags; None where it is not a call."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


@dataclass(frozen=True)
class Reply:
    """A whole reply of the model, taken apart."""

    reasoning: str = ""
    answer: str = ""
    calls: tuple[ToolCall, ...] = field(default=())


def parse_reply(text: str, mode: Mode) -> Reply:
    """Take a whole reply apart; the same cuts as the Splitter makes in a stream."""
    splitter = Splitter(mode)
    pieces = splitter.feed(text) + splitter.finish()
    calls = [parse_call(piece.text) for piece in pieces if piece.channel == "call"]
    return Reply(
        "".join(piece.text for piece in pieces if piece.channel == "reasoning"),
        "".join(piece.text for piece in pieces if piece.channel == "answer"),
        tuple(call for call in calls if call is not None),
    )


_THINKING_FORM = re.compile(r"<think>\n(?!\n)(.+?)\n</think>\n\n(?=\S)", re.S)


def is_well_formed(text: str, mode: Mode) -> bool:
    """Whether a reply has its mode's form, without <|im_end|>.

    Thinking: one think block with something in it, then text or a call. Direct: something, and no
    think tag. Either way every call is closed and is a call.
    """
    if mode == "thinking":
        block = _THINKING_FORM.match(text)
        if block is None:
            return False
        text = text[block.end() :]
        if THINK in block[1] or CALL in block[1]:
            return False
    if not text.strip() or THINK in text or END_THINK in text:
        return False
    outside = re.sub(f"{CALL}(.*?){END_CALL}", _blank_if_call, text, flags=re.S)
    return CALL not in outside and END_CALL not in outside


def _blank_if_call(match: re.Match[str]) -> str:
    return "" if parse_call(match[1]) else match[0]
