"""Ask a served model the held-out questions, in both modes, and score the answers."""

import asyncio
import json
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.chat import Chat, Mode, check_message, is_well_formed, parse_reply
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.protocol import Engine, Sampling
from pipeline.errors import DataError
from pipeline.evaluate.matcher import is_correct
from pipeline.recipe import Evaluate

log = logging.getLogger(__name__)

PARALLEL = 8


@dataclass(frozen=True)
class Question:
    """One held-out question and the value its answer must name."""

    messages: list[dict[str, Any]]
    answer: str

    @property
    def text(self) -> str:
        """The last user message: what it names itself does not count in the answer."""
        return str(self.messages[-1]["content"])


def read_questions(path: Path) -> list[Question]:
    """Questions of a JSONL file; raises DataError at the line that is not one."""
    try:
        # Not splitlines(): a JSON string may hold other line breaks than \n as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: evaluate.questions must be JSONL") from error
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
    return question


def evaluate(
    gguf: Path, chat: Chat, questions: Sequence[Question], settings: Evaluate, engine_log: Path
) -> dict[str, Any]:
    """Score a GGUF file: per mode the share answered correctly and the share well-formed.

    Answers are greedy, so that the same file gives the same score.
    """
    return asyncio.run(_evaluate(gguf, chat, questions, settings, engine_log))


async def _evaluate(
    gguf: Path, chat: Chat, questions: Sequence[Question], settings: Evaluate, engine_log: Path
) -> dict[str, Any]:
    candidates = sorted({question.answer for question in questions})
    plan: list[tuple[Mode, int, int]] = [
        ("direct", settings.direct, settings.direct_max_tokens),
        ("thinking", settings.thinking, settings.thinking_max_tokens),
    ]
    longest = max(len(chat.prompt_ids(q.messages, None, "direct")) for q in questions)
    room = longest + max(tokens for _, _, tokens in plan)
    result: dict[str, Any] = {}
    async with await LlamaCpp.start(
        gguf, slots=PARALLEL, context_tokens=room, log=engine_log
    ) as engine:
        for mode, count, max_tokens in plan:
            asked = questions[:count]
            log.info("%s: asking %d questions in %s mode", gguf.name, len(asked), mode)
            texts = await _ask_all(engine, chat, asked, mode, max_tokens)
            result[mode] = _score(asked, texts, mode, candidates)
            log.info("%s of %d answered correctly", result[mode]["num_correct"], len(asked))
    return result


async def _ask_all(
    engine: Engine, chat: Chat, questions: Sequence[Question], mode: Mode, max_tokens: int
) -> list[str]:
    at_once = asyncio.Semaphore(PARALLEL)

    async def ask(question: Question) -> str:
        async with at_once:
            prompt = chat.prompt_ids(question.messages, None, mode)
            stream = engine.generate(prompt, Sampling(max_tokens=max_tokens, temperature=0.0))
            async with aclosing(stream):
                return "".join([delta.text async for delta in stream])

    return await asyncio.gather(*(ask(question) for question in questions))


def _score(
    questions: Sequence[Question], texts: Sequence[str], mode: Mode, candidates: Sequence[str]
) -> dict[str, Any]:
    answers = []
    for question, text in zip(questions, texts, strict=True):
        reply = parse_reply(text, mode)
        answers.append(
            {
                "question": question.text,
                "expected": question.answer,
                "text": text,
                "correct": is_correct(reply.answer, question.text, question.answer, candidates),
                "well_formed": is_well_formed(text, mode),
            }
        )
    count = max(1, len(answers))
    return {
        "questions": len(answers),
        "num_correct": sum(bool(a["correct"]) for a in answers),
        "correct": sum(bool(a["correct"]) for a in answers) / count,
        "well_formed": sum(bool(a["well_formed"]) for a in answers) / count,
        "answers": answers,
    }
