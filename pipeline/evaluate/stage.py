"""Ask a served model the held-out questions, in both modes, and score the answers."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from pipeline.chat import Chat, Mode
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.protocol import Engine, Sampling
from pipeline.questions import Question, candidates_of, judge
from pipeline.recipe import Evaluate

log = logging.getLogger(__name__)

PARALLEL = 8


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
    candidates = candidates_of(questions)
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
        verdict = judge(text, mode, question, candidates)
        answers.append(
            {
                "question": question.text,
                "expected": question.answer,
                "text": text,
                "correct": verdict.correct,
                "well_formed": verdict.well_formed,
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
