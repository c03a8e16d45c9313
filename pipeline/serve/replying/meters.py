"""Which of a reply's tokens are reasoning, and which stand in which bit of its answer."""

from collections.abc import Sequence

from pipeline.chat import END_THINK, TAGS, Piece
from pipeline.engine.protocol import Delta, TokenLogprob


class ReasoningMeter:
    """Counts the tokens up to and with `</think>`, in whole deltas."""

    def __init__(self) -> None:
        self.tokens = 0
        self._unsettled = 0
        self._tail = ""

    def add(self, num_tokens: int, text: str, pieces: Sequence[Piece]) -> None:
        """A delta that gives no piece, such as a tag, belongs to what comes after it."""
        self._unsettled += num_tokens
        text = self._tail + text
        self._tail = text[-(len(END_THINK) - 1) :]
        if END_THINK in text or "reasoning" in [piece.channel for piece in pieces]:
            self.tokens += self._unsettled
            self._unsettled = 0
        elif pieces:
            self._unsettled = 0


class TextLogprobs:
    """Hands out tokens with the text they begin in: text may be held back, and stops cut it off."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, TokenLogprob]] = []
        self._num_read = 0
        self._num_told = 0

    def add(self, delta: Delta) -> None:
        """The next bit of the text, and its tokens if they are asked for."""
        self._waiting += [(self._num_read, token) for token in delta.logprobs]
        self._num_read += len(delta.text)

    def of(self, text: str) -> tuple[TokenLogprob, ...]:
        """The tokens that begin in the next text that is told."""
        self._num_told += len(text)
        if not self._waiting:
            return ()
        told = tuple(token for place, token in self._waiting if place < self._num_told)
        self._waiting = self._waiting[len(told) :]
        return told


class AnswerLogprobs(TextLogprobs):
    """The same of an answer: its tags, and line breaks where the Splitter takes them off, go."""

    def __init__(self, *, is_begun: bool) -> None:
        super().__init__()
        self._at_start = not is_begun

    def add(self, delta: Delta) -> None:
        """A delta of an answer whose tokens are asked for; others have none."""
        if not delta.logprobs:
            return
        if delta.text in TAGS:
            self._at_start = True
            return
        text = delta.text.lstrip("\n") if self._at_start else delta.text
        if text or not delta.text:
            super().add(delta._replace(text=text))
        self._at_start = self._at_start and not text
