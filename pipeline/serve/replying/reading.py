"""What has been understood of one reply so far: deltas in, events out, through all its phases."""

from collections.abc import Sequence

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
from pipeline.engine.protocol import Delta, Finish
from pipeline.serve.asking.order import Order
from pipeline.serve.replying.apart import take_apart
from pipeline.serve.replying.events import Called, Ended, Event, Said, Tally, Usage
from pipeline.serve.replying.meters import AnswerLogprobs, ReasoningMeter
from pipeline.serve.replying.phases import Outcome, Phase
from pipeline.serve.replying.stops import StopStrings


class Reading:
    """`outcome` is set once the phase is over; then comes the next phase, or `end`.

    What is done for every token takes and gives lists: a generator in each layer, and `replace` of
    the usage, took as long as all the rest.
    """

    def __init__(self, order: Order, chat: Chat, tally: Tally) -> None:
        self.outcome: Outcome | None = None
        self._order = order
        self._chat = chat
        self._phase: Phase | None = None
        self._said = _Said()
        self._splitter = self._new_splitter()
        self._reasoning, self._answer = Untagged(), Untagged()
        self._stops = StopStrings(order.stops)
        self._meter = ReasoningMeter()
        self._logprobs = AnswerLogprobs(is_begun=order.is_begun)
        self._num_phases = 0
        self._num_calls = 0
        self._finish: Finish = "stop"
        self._tally = tally
        self._tally.usage = Usage(prompt_tokens=len(order.prompt_ids))
        self._ids: list[int] = []
        self._tags = {chat.token_id(tag): tag for tag in TAGS}

    def begin(self, phase: Phase) -> list[Event]:
        """Start a phase with what is given; there may be no room left for it."""
        self._ids += self._said.ids(self._chat)
        self._phase, self._said, self.outcome = phase, _Said(), None
        self._num_phases += 1
        given = self._chat.reply_ids(phase.given) if phase.given else []
        if len(given) >= self.tokens_left:
            return self._finish_with("length")
        self._ids += given
        text = phase.given if phase.is_told else phase.given[phase.given.rindex("</") :]
        return self._understand(Delta(text, len(given)))

    @property
    def prompt_ids(self) -> list[int]:
        """What the phase continues."""
        return self._order.prompt_ids + self._ids

    @property
    def tokens_left(self) -> int:
        """Of the whole reply's `max_tokens`."""
        return self._order.sampling.max_tokens - self._tally.usage.completion_tokens

    def read(self, delta: Delta) -> list[Event]:
        """Take a delta of the phase, give its events."""
        assert self._phase is not None
        self._said.add(delta)
        if self._phase.is_thought and self._said.is_no_thought:
            self._forget()
            self.outcome = "no_thought"
            return []
        if len(delta.ids) < 2:
            events = self._understand(delta)
        else:
            events = []
            for part in take_apart(delta, self._tags):
                if self.outcome is None:
                    events += self._understand(part)
        if delta.finish is None or self.outcome is not None:
            return events
        outcome = self._outcome(delta)
        if outcome == "over":
            return events + self._finish_with(delta.finish)
        self.outcome = outcome
        return events

    def end(self) -> Ended:
        """The last event."""
        was_thought = self.outcome == "thought" and self._order.ends_after_thinking
        stop = END_THINK if was_thought else self._stops.met
        finish = "tool_calls" if self._num_calls else self._finish
        return Ended(finish, self._finish, stop)

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

    def _understand(self, delta: Delta) -> list[Event]:
        text = delta.text
        if delta.stop_id is not None:
            text += self._chat.decode([delta.stop_id])
        self._logprobs.add(delta)
        pieces = self._splitter.feed(text)
        self._count(delta, text, pieces)
        return self._tell(pieces)

    def _finish_with(self, finish: Finish) -> list[Event]:
        """The reply is over: what was held back is told."""
        self._finish, self.outcome = finish, None
        pieces = self._splitter.finish()
        self._count(Delta(), "", pieces)
        events = self._tell(pieces)
        if self.outcome is None:
            self._say(self._stops.finish(), events)
        self.outcome = "over"
        return events

    def _forget(self) -> None:
        """The model does not think: its first words are to be said again, under the right stops."""
        self._said, self._meter = _Said(), ReasoningMeter()
        self._splitter = self._new_splitter()
        usage = self._tally.usage
        self._tally.usage = Usage(usage.prompt_tokens, cached_tokens=usage.cached_tokens)

    def _new_splitter(self) -> Splitter:
        order = self._order
        may_call = bool(order.constraints.tools)
        return Splitter(order.mode, is_begun=order.is_begun, may_call=may_call)

    def _count(self, delta: Delta, text: str, pieces: Sequence[Piece]) -> None:
        if self._order.mode == "thinking":
            self._meter.add(delta.num_tokens, text, pieces)
        usage, is_first = self._tally.usage, self._num_phases == 1
        self._tally.usage = Usage(
            usage.prompt_tokens,
            usage.completion_tokens + delta.num_tokens,
            self._meter.tokens,
            max(usage.cached_tokens, delta.num_cached_tokens if is_first else 0),
        )

    def _tell(self, pieces: Sequence[Piece]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            if piece.channel == "reasoning":
                events.append(Said("reasoning", self._reasoning.feed(piece.text)))
            else:
                self._tell_of_answer(piece, events)
            if self.outcome == "over":
                break
        return events

    def _tell_of_answer(self, piece: Piece, events: list[Event]) -> None:
        call = parse_call(piece.text) if piece.channel == "call" else None
        if call is not None and call.name in self._order.constraints.tool_names:
            # What came before the call is told before it, and no stop reaches across it.
            self._say(self._stops.finish(), events)
            events.append(Called(self._num_calls, call))
            self._num_calls += 1
            is_over = self._num_calls == self._order.constraints.max_calls
        else:
            # A call nobody could answer is shown as what it is: text.
            text = piece.text if piece.channel == "answer" else without_tags(piece.text)
            self._say(self._stops.feed(text), events)
            is_over = self._stops.is_met
        if is_over:
            self._finish, self.outcome = "stop", "over"

    def _say(self, text: str, events: list[Event]) -> None:
        if text:
            events.append(Said("answer", self._answer.feed(text), self._logprobs.of(text)))


class _Said:
    """What the model itself has said in one phase."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._num_tokens = 0
        self._stop_id: int | None = None
        self._is_thought = False

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._ids += delta.ids
        self._stop_id = delta.stop_id
        # What ended it is a token without text.
        self._num_tokens += delta.num_tokens - (delta.finish == "stop")

    @property
    def is_no_thought(self) -> bool:
        """Whether it does certainly not begin with <think>."""
        if self._is_thought:
            return False
        head = "".join(self._texts).lstrip("\n")
        self._is_thought = head.startswith(THINK)
        return not (self._is_thought or THINK.startswith(head))

    def ids(self, chat: Chat) -> list[int]:
        """Of its tokens; of its text, where the engine has kept some to itself."""
        has_all = len(self._ids) == self._num_tokens
        ids = self._ids if has_all else chat.reply_ids("".join(self._texts))
        return [*ids, self._stop_id] if self._stop_id is not None else ids
