"""What has been understood of one reply so far: deltas in, events out, through all its phases."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipeline.chat import (
    CALL,
    END_THINK,
    TAGS,
    THINK,
    Chat,
    Piece,
    Splitter,
    Untagged,
    parse_call,
    without_tags,
)
from pipeline.engine.protocol import Delta, Finish, TokenLogprob
from pipeline.serve.events import Called, Ended, Event, Said, Tally, Usage
from pipeline.serve.order import Order
from pipeline.serve.phases import Outcome, Phase
from pipeline.serve.stops import StopStrings


class Reading:
    """`outcome` is set once the phase is over; then comes the next phase, or `end`."""

    def __init__(self, order: Order, chat: Chat, tally: Tally) -> None:
        self.outcome: Outcome | None = None
        self._order = order
        self._chat = chat
        self._phase: Phase | None = None
        self._said = _Said()
        self._splitter = self._new_splitter()
        self._reasoning, self._answer = Untagged(), Untagged()
        self._stops = StopStrings(order.stops)
        self._meter = _ReasoningMeter()
        self._logprobs = _AnswerLogprobs(is_begun=order.is_begun)
        self._num_phases = 0
        self._num_calls = 0
        self._finish: Finish = "stop"
        self._tally = tally
        self._tally.usage = Usage(prompt_tokens=len(order.prompt_ids))
        self._ids: list[int] = []

    def begin(self, phase: Phase) -> Iterator[Event]:
        """Start a phase with what is given; there may be no room left for it."""
        self._ids += self._said.ids(self._chat)
        self._phase, self._said, self.outcome = phase, _Said(), None
        self._num_phases += 1
        given = self._chat.reply_ids(phase.given)
        if len(given) >= self.tokens_left:
            yield from self._finish_with("length")
            return
        self._ids += given
        text = phase.given if phase.is_told else phase.given[phase.given.rindex("</") :]
        yield from self._understand(Delta(text, len(given)))

    @property
    def prompt_ids(self) -> list[int]:
        """What the phase continues."""
        return self._order.prompt_ids + self._ids

    @property
    def tokens_left(self) -> int:
        """Of the whole reply's `max_tokens`."""
        return self._order.sampling.max_tokens - self._tally.usage.completion_tokens

    def read(self, delta: Delta) -> Iterator[Event]:
        """Take a delta of the phase, give its events."""
        assert self._phase is not None
        self._said.add(delta)
        if self._phase.is_thought and self._said.is_no_thought:
            self._forget()
            self.outcome = "no_thought"
            return
        yield from self._understand(delta)
        if delta.finish is None or self.outcome is not None:
            return
        outcome = self._outcome(delta)
        if outcome != "over":
            self.outcome = outcome
        else:
            yield from self._finish_with(delta.finish)

    def end(self) -> Ended:
        """The last event."""
        return Ended("tool_calls" if self._num_calls else self._finish, self._finish)

    def _outcome(self, delta: Delta) -> Outcome:
        assert self._phase is not None
        if delta.stop_id == self._chat.token_id(CALL):
            return "call"
        if delta.stop_id is not None:
            return "thought"
        if not self._phase.is_thought or self.tokens_left <= 0:
            return "over"
        # A turn that ends in its thought still owes what the client has asked for.
        return "budget" if delta.finish == "length" or self._order.constraints.is_owed else "over"

    def _understand(self, delta: Delta) -> Iterator[Event]:
        stop = "" if delta.stop_id is None else self._chat.decode([delta.stop_id])
        self._logprobs.add(delta)
        pieces = self._splitter.feed(delta.text + stop)
        self._count(delta, delta.text + stop, pieces)
        yield from self._tell(pieces)

    def _finish_with(self, finish: Finish) -> Iterator[Event]:
        """The reply is over: what was held back is told."""
        self._finish, self.outcome = finish, None
        pieces = self._splitter.finish()
        self._count(Delta(), "", pieces)
        yield from self._tell(pieces)
        if self.outcome is None:
            yield from self._say(self._stops.finish())
        self.outcome = "over"

    def _forget(self) -> None:
        """The model does not think: its first words are to be said again, under the right stops."""
        self._said, self._meter = _Said(), _ReasoningMeter()
        self._splitter = self._new_splitter()
        self._tally.usage = replace(self._tally.usage, completion_tokens=0, reasoning_tokens=0)

    def _new_splitter(self) -> Splitter:
        order = self._order
        may_call = bool(order.constraints.tools)
        return Splitter(order.mode, is_begun=order.is_begun, may_call=may_call)

    def _count(self, delta: Delta, text: str, pieces: Sequence[Piece]) -> None:
        self._meter.add(delta.num_tokens, text, pieces)
        self._tally.usage = replace(
            self._tally.usage,
            completion_tokens=self._tally.usage.completion_tokens + delta.num_tokens,
            reasoning_tokens=self._meter.tokens if self._order.mode == "thinking" else 0,
            cached_tokens=max(
                self._tally.usage.cached_tokens,
                delta.num_cached_tokens if self._num_phases == 1 else 0,
            ),
        )

    def _tell(self, pieces: Sequence[Piece]) -> Iterator[Event]:
        for piece in pieces:
            if piece.channel == "reasoning":
                yield Said("reasoning", self._reasoning.feed(piece.text))
            else:
                yield from self._tell_of_answer(piece)
            if self.outcome == "over":
                return

    def _tell_of_answer(self, piece: Piece) -> Iterator[Event]:
        call = parse_call(piece.text) if piece.channel == "call" else None
        if call is not None and call.name in self._order.constraints.tool_names:
            # What came before the call is told before it, and no stop reaches across it.
            yield from self._say(self._stops.finish())
            yield Called(self._num_calls, call)
            self._num_calls += 1
            is_over = self._num_calls == self._order.constraints.max_calls
        else:
            # A call nobody could answer is shown as what it is: text.
            text = piece.text if piece.channel == "answer" else without_tags(piece.text)
            yield from self._say(self._stops.feed(text))
            is_over = self._stops.is_met
        if is_over:
            self._finish, self.outcome = "stop", "over"

    def _say(self, text: str) -> Iterator[Said]:
        if text:
            yield Said("answer", self._answer.feed(text), self._logprobs.of(text))


class _Said:
    """What the model itself has said in one phase."""

    def __init__(self) -> None:
        self._text = ""
        self._ids: list[int] = []
        self._num_tokens = 0
        self._stop_id: int | None = None

    def add(self, delta: Delta) -> None:
        self._text += delta.text
        self._ids += delta.ids
        self._stop_id = delta.stop_id
        # What ended it is a token without text.
        self._num_tokens += delta.num_tokens - (delta.finish == "stop")

    @property
    def is_no_thought(self) -> bool:
        """Whether it does certainly not begin with <think>."""
        head = self._text.lstrip("\n")
        return not (head.startswith(THINK) or THINK.startswith(head))

    def ids(self, chat: Chat) -> list[int]:
        """Of its tokens; of its text, where the engine has kept some to itself."""
        ids = self._ids if len(self._ids) == self._num_tokens else chat.reply_ids(self._text)
        return [*ids, self._stop_id] if self._stop_id is not None else ids


class _ReasoningMeter:
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
        if END_THINK in text or any(piece.channel == "reasoning" for piece in pieces):
            self.tokens += self._unsettled
            self._unsettled = 0
        elif pieces:
            self._unsettled = 0


class _AnswerLogprobs:
    """Hands out tokens with the text they begin in: text may be held back, and stops cut it off."""

    def __init__(self, *, is_begun: bool) -> None:
        self._waiting: list[tuple[int, TokenLogprob]] = []
        self._at_start = not is_begun
        """Where the Splitter takes line breaks off."""
        self._num_read = 0
        """Characters of the answer, without those line breaks and tags."""
        self._num_told = 0

    def add(self, delta: Delta) -> None:
        """A delta of an answer whose tokens are asked for; others have none."""
        if not delta.logprobs:
            return
        if delta.text in TAGS:
            self._at_start = True
            return
        text = delta.text.lstrip("\n") if self._at_start else delta.text
        if text or not delta.text:
            self._waiting += [(self._num_read, token) for token in delta.logprobs]
        self._num_read += len(text)
        self._at_start = self._at_start and not text

    def of(self, text: str) -> tuple[TokenLogprob, ...]:
        """The tokens that begin in the next text of the answer."""
        self._num_told += len(text)
        told = tuple(token for place, token in self._waiting if place < self._num_told)
        self._waiting = self._waiting[len(told) :]
        return told
