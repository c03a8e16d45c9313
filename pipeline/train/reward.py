"""What a reply is worth: its answer can be checked, and so can its form."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.chat import TAGS, Chat, Mode
from pipeline.questions import Question, Verdict, candidates_of, judge

FORM = 0.2
"""For a well-formed reply with a wrong answer. It tells a model that never answers right yet what
is a reply at all; and it is little: answering right once in four replies is worth more."""


@dataclass(frozen=True)
class Reward:
    """Judges replies, given as ids, as an evaluation does; and they must have ended."""

    chat: Chat
    questions: Sequence[Question]
    mode: Mode

    def judge(self, completion_ids: list[int], question: Question) -> Verdict:
        """A reply has its form only if <|im_end|> ends it and no other control token is in it."""
        *reply, last = completion_ids
        has_ended = last == self.chat.end_of_turn_id
        text = self.chat.decode(reply if has_ended else completion_ids)
        verdict = judge(text, self.mode, question, candidates_of(self.questions))
        tags = {self.chat.tokenizer.token_to_id(tag) for tag in TAGS}
        is_clean = not (self.chat.control_ids - tags) & set(reply)
        return verdict._replace(well_formed=verdict.well_formed and has_ended and is_clean)

    def grade(
        self, completion_ids: list[list[int]], question: list[int], log_metric: Any, **_: Any
    ) -> list[float]:
        """TRL's reward function: of each reply to the question of that index.

        1 for a correct answer in a well-formed reply, FORM for the form alone, else 0.
        """
        verdicts = [
            self.judge(ids, self.questions[index])
            for ids, index in zip(completion_ids, question, strict=True)
        ]
        for name in Verdict._fields:
            log_metric(name, sum(getattr(one, name) for one in verdicts) / len(verdicts))
        return [one.well_formed * (1.0 if one.correct else FORM) for one in verdicts]
