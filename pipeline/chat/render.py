"""Conversations to text and ids, by the checkpoint's own template and tokenizer."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from pipeline.chat.message import Message, Mode, prepare_message, prepare_tools
from pipeline.chat.token_bytes import token_bytes
from pipeline.chat.token_cache import Encode, TokenCache
from pipeline.errors import BaseError, DataError

END_OF_TURN = "<|im_end|>"

# A literal control token inside a message must stay ordinary text. It travels through the template
# as ESCAPE plus one character that says which literal it is, and becomes ordinary ids afterwards.
_ESCAPE = "\U0010fffd"
_FIRST_CODE = 0xE000
_MAX_KEPT, _MAX_KEPT_CHARACTERS = 512, 1 << 14
_TURN_START = re.compile(r"(?<=<\|im_end\|>)(?=\s*<\|im_start\|>)")


@dataclass(frozen=True)
class Turn:
    """One trained assistant turn: what the model is given, and what it must emit."""

    prompt: str
    completion: str
    """Through <|im_end|>, which is its last token."""
    prompt_ids: list[int]
    completion_ids: list[int]
    control_ids: list[int]
    """The control tokens that the template itself wrote, in order."""
    index: int
    """The assistant message's place in the conversation."""
    mode: Mode


def mode_of(message: Message) -> Mode:
    """The mode an assistant message was written in: thinking if it has reasoning, else direct."""
    return "thinking" if prepare_message(message)["reasoning_content"] else "direct"


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
        pieces = [self._encode_each([t[:1], t[1:]]) for t in self._literals]
        self._literal_ids = [first + rest for first, rest in pieces]
        self.end_of_turn_id = self.token_id(END_OF_TURN)
        self._control = {token.content: token_id for token_id, token in added.items()}
        self._control_pattern = re.compile("|".join(map(re.escape, self._control)))
        self.control_ids = frozenset(added)
        self.num_ids = self.tokenizer.get_vocab_size(with_added_tokens=True)
        # A control token cuts a text whatever stands around it, so turns are encoded one by one;
        # the rows of one conversation, and those of one system prompt, have most turns in common.
        self._segments = TokenCache(_MAX_KEPT, _MAX_KEPT_CHARACTERS)

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
                tools=self._escape(prepare_tools(tools)) if tools else None,
                add_generation_prompt=mode is not None,
                enable_thinking=mode != "direct",
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"the template cannot express these messages: {error}") from error

    def encode(self, rendered: str) -> list[int]:
        """Ids of a rendered text; control tokens of the template are single ids."""
        return self._encode_rendered([rendered], self._encode_each)[0]

    def encode_all(self, rendered: Sequence[str]) -> list[list[int]]:
        """As `encode` of each, in one call of the tokenizer, which has a thread for each core.

        In a thread it needs the GIL before and after that, not for each text.
        """
        return self._encode_rendered(rendered, self._encode_at_once)

    def text_ids(self, text: str) -> list[int]:
        """Ids of a plain text that no template has seen; its literal control tokens stay text."""
        return self._encode_segments([self._escape(text)], self._encode_each)[0]

    def _encode_rendered(self, rendered: Sequence[str], encode: Encode) -> list[list[int]]:
        split = [_TURN_START.split(text) for text in rendered]
        segments = [segment for segments in split for segment in segments]
        found = iter(self._segments.ids(segments, lambda new: self._encode_segments(new, encode)))
        return [[i for _ in segments for i in next(found)] for segments in split]

    def _encode_segments(self, segments: Sequence[str], encode: Encode) -> list[list[int]]:
        split = [segment.split(_ESCAPE) for segment in segments]
        # What follows an escape begins with the character that says which literal it is.
        pieces = [p[1:] if place else p for parts in split for place, p in enumerate(parts)]
        found = iter(encode(pieces))
        whole: list[list[int]] = []
        for _, *escaped in split:
            ids = list(next(found))
            for piece in escaped:
                ids += self._literal_ids[ord(piece[0]) - _FIRST_CODE] + next(found)
            whole.append(ids)
        return whole

    def verbatim(self, text: str) -> str:
        """A text whose control tokens are meant, as `encode` takes it."""
        return text.replace(_ESCAPE, _ESCAPE + chr(_FIRST_CODE))

    def show(self, rendered: str) -> str:
        """A rendered text with its literals put back: for people, never for encoding."""
        return re.sub(
            f"{_ESCAPE}(.)", lambda m: self._literals[ord(m[1]) - _FIRST_CODE], rendered, flags=re.S
        )

    def reply_ids(self, text: str) -> list[int]:
        """Ids of what a model said: a tag in it is the token itself."""
        return self._encode_each([text])[0]

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, which need not be a whole character."""
        return token_bytes(self.tokenizer, token_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens visible."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, mode: Mode
    ) -> list[int]:
        """What an engine is asked to continue."""
        return self.encode(self.render(messages, tools, mode))

    def begun(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[str, str]:
        """Prompt and reply where the last message is the beginning of it, to be encoded apart."""
        index = len(messages) - 1
        prompt, completion = self._render_turn(messages, tools, index, mode_of(messages[index]))
        return prompt, completion.removesuffix(END_OF_TURN)

    def turns(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Iterator[Turn]:
        """Each assistant turn as inference would meet it, in its own mode: see `turn`.

        A turn before any user turn is context only.
        """
        asked = False
        for index, message in enumerate(messages):
            asked = asked or message["role"] == "user"
            if message["role"] == "assistant" and asked:
                yield self.turn(messages, tools, index)

    def turn(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        index: int,
        mode: Mode | None = None,
    ) -> Turn:
        """One assistant turn as inference would meet it (design law 1).

        The prompt is the official render of everything before the turn, with the generation prompt
        of `mode`, by default the turn's own: thinking if it has reasoning, else direct. The
        completion is what the official render of the turn adds to that.
        Raises DataError where the template's text does not begin with its own prompt.
        """
        mode = mode or mode_of(messages[index])
        prompt, completion = self._render_turn(messages, tools, index, mode)
        return Turn(
            self.show(prompt),
            self.show(completion),
            self.encode(prompt),
            self.encode(completion),
            [self._control[t] for t in self._control_pattern.findall(prompt + completion)],
            index,
            mode,
        )

    def _render_turn(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, index: int, mode: Mode
    ) -> tuple[str, str]:
        """Prompt and completion."""
        prompt = self.render(messages[:index], tools, mode)
        full = self.render(messages[: index + 1], tools, None)
        if not full.startswith(prompt):
            what = "the template does not continue its own prompt"
            if index and messages[index - 1]["role"] == "assistant":
                what += "; merge the answers that follow one another"
            raise DataError(f"message {index}: {what}")
        completion, end, _ = full[len(prompt) :].partition(END_OF_TURN)
        return prompt, completion + end

    def _encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """One after another: whoever has a process for each core needs no threads as well."""
        return [ids for text in texts for ids in self._encode_at_once([text])]

    def _encode_at_once(self, texts: Sequence[str]) -> list[list[int]]:
        """Without each token's place in the text: finding it takes a seventh of the time."""
        found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

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


def _load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise BaseError(f"{path} is missing: a checkpoint needs its tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception for every fault of the file
        raise BaseError(f"{path} is not a tokenizer: {error}") from error
    # The file may say what its last user wanted of batches. Here every text keeps all its tokens.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


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
