"""The engine calls of one reply: think, answer, call, each with its stops and its grammar.

One call where nothing asks for more: no budget, tools, form, log-probabilities of a reply that
thinks. Then the model's own text takes it from one part to the next.
"""

from dataclasses import dataclass, replace
from typing import Literal

from pipeline.chat import CALL, EARLY_STOP, END_THINK, TAGS, Chat
from pipeline.engine.protocol import Sampling, StopToken
from pipeline.serve.asking.order import Order

Outcome = Literal["over", "thought", "budget", "no_thought", "call"]
"""Why a phase ended: with the reply, after a thought, in one that has used up its budget, before
any, at the beginning of a call."""
AFTER_THOUGHT = "\n\n"
"""What stands between a thought and an answer that must begin at once."""


@dataclass(frozen=True)
class Phase:
    """One continuation; the prompt is everything so far, and then what is given."""

    sampling: Sampling
    """Its `max_tokens` are still the whole reply's."""
    given: str = ""
    """Text of ours; its tokens count as the model's."""
    is_told: bool = True
    """Whether what is given is read as the model's, or only its last tag."""
    max_tokens: int | None = None
    """A bound of this phase alone."""
    is_thought: bool = False
    """Whether it begins with a thought, and that is all of it."""


class Phases:
    """Which phase comes first, and which after which outcome."""

    def __init__(self, order: Order, chat: Chat) -> None:
        self._order = order
        self._chat = chat

    def first(self) -> Phase:
        """A reply in direct mode is past its thought."""
        order = self._order
        if order.mode == "direct":
            return self._answer("")
        if not order.splits_thinking:
            return Phase(order.sampling)
        sampling = replace(order.sampling, stop_tokens=(self._stop(END_THINK),))
        return Phase(sampling, max_tokens=order.budget, is_thought=True)

    def after(self, outcome: Outcome) -> Phase | None:
        """None where the reply is over."""
        order, wants = self._order, self._order.constraints
        if outcome == "call":
            return Phase(self._held_to(wants.calls))
        if outcome == "no_thought":
            return self._answer("")
        if outcome == "over" or order.ends_after_thinking:
            return None
        if outcome == "budget":
            return replace(self._answer(EARLY_STOP), is_told=False)
        return self._answer(AFTER_THOUGHT if wants.is_owed else "")

    def _answer(self, given: str) -> Phase:
        order, wants = self._order, self._order.constraints
        if wants.must_call and wants.calls is not None:
            return Phase(self._held_to(wants.calls), given + CALL)
        sampling = replace(self._held_to(wants.answer), top_logprobs=order.top_logprobs)
        if wants.answer is None and wants.calls is not None:
            sampling = replace(sampling, stop_tokens=(self._stop(CALL),))
        return Phase(sampling, given)

    def _held_to(self, grammar: str | None) -> Sampling:
        """A tag's token would be its text to llama.cpp, in any string of a grammar.

        No bias of the client's brings it back. Where the grammar itself asks for a tag, nothing
        else can be drawn.
        """
        if grammar is None:
            return self._order.sampling
        may_call = grammar == self._order.constraints.answer and self._order.constraints.calls
        unwanted = [tag for tag in TAGS if not (may_call and tag == CALL)]
        bias = {self._chat.token_id(tag): -100.0 for tag in unwanted}
        sampling = self._order.sampling
        return replace(sampling, grammar=grammar, logit_bias={**sampling.logit_bias, **bias})

    def _stop(self, tag: str) -> StopToken:
        return StopToken(self._chat.token_id(tag), tag)
