"""Questions whose answers can be checked: read from a file, and replies to them judged.

An evaluation and a training by rewards judge here, so they cannot differ.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.chat import Mode, check_message, is_well_formed, parse_reply
from pipeline.errors import DataError
from pipeline.matcher import is_correct


@dataclass(frozen=True)
class Question:
    """One question and the value its answer must name."""

    messages: list[dict[str, Any]]
    answer: str

    @property
    def text(self) -> str:
        """The last user message: what it names itself does not count in the answer."""
        return str(self.messages[-1]["content"])


class Verdict(NamedTuple):
    """What a reply is worth."""

    correct: bool
    well_formed: bool


def read_questions(path: Path) -> list[Question]:
    """Questions of a JSONL file; raises DataError at the line that is not one."""
    try:
        # Not splitlines(): a JSON string may hold other line breaks than \n as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: questions must be a JSONL file") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                questions.append(_parse(json.loads(line)))
        except DataError as error:
            raise DataError.at(path, number, str(error)) from error
        except (ValueError, LookupError, TypeError) as error:
            raise DataError.at(path, number, "a question needs `messages` and `answer`") from error
    if not questions:
        raise DataError(f"{path} holds no questions")
    return questions


def _parse(row: dict[str, Any]) -> Question:
    question = Question(row["messages"], row["answer"])
    last = question.messages[-1]["content"]
    if not all(isinstance(text, str) and text for text in (question.answer, last)):
        raise ValueError("not texts")
    for index, message in enumerate(question.messages):
        check_message(index, message)
    if question.messages[-1]["role"] != "user":
        raise DataError("the last message of a question must be the user's")
    return question


def candidates_of(questions: Sequence[Question]) -> list[str]:
    """All answers: a reply that names another one than its question's is wrong."""
    return sorted({question.answer for question in questions})


def judge(text: str, mode: Mode, question: Question, candidates: Sequence[str]) -> Verdict:
    """Judge a reply's text, without <|im_end|>; what is only thought does not count."""
    answer = parse_reply(text, mode).answer
    return Verdict(
        is_correct(answer, question.text, question.answer, candidates), is_well_formed(text, mode)
    )
