"""Let the base answer general prompts in thinking mode; what is sound becomes a source.

One at a time, a reply depends on the base, the prompt, the sampling and the seed alone: neither on
the replies before it nor on how often the run was stopped. Under replay.parallel above 1 it depends
on what else is in the batch, too, whose rounding differs; a finished reply stays as it is.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from pipeline.chat import Chat
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.protocol import RECOMMENDED, Engine, Finish, Sampling
from pipeline.errors import DataError
from pipeline.recipe import Replay
from pipeline.replay.journal import Journal, Reply
from pipeline.replay.judge import conversation, judge
from pipeline.replay.progress import Tally, show_progress
from pipeline.replay.prompts import Prompt, read_prompts
from pipeline.run import Run, hash_value, write_text


@dataclass(frozen=True)
class Answerer:
    """The model that answers."""

    chat: Chat
    sha256: str
    """Of the checkpoint."""
    write_gguf: Callable[[], Path]
    """Makes its GGUF file, or finds it; called only if something is left to ask."""


@dataclass(frozen=True)
class Question:
    """A prompt, how its reply is drawn, and the sha256 of everything the reply depends on."""

    prompt: Prompt
    sampling: Sampling
    key: str


def replay(
    settings: Replay, seed: int, answerer: Answerer, run: Run, console: Console
) -> tuple[Tally, bool]:
    """Write run.replay in the prompts' order and describe it in the manifest.

    Returns what became of the prompts, and whether anything was asked or written for it.

    Every finished reply is kept in run.replay_journal at once; a rerun asks only what is missing.
    Raises DataError for a prompt that cannot be asked, and if no reply can be kept.
    """
    prompts = read_prompts(Path(settings.prompts), answerer.chat)
    questions = [_question(prompt, settings, seed, answerer.sha256) for prompt in prompts]
    journal = Journal(run.replay_journal)
    replies = journal.read()
    is_asked = any(question.key not in replies for question in questions)
    if is_asked:
        _ask_missing(questions, replies, settings, answerer, run, console)
        replies = journal.read()
    tally = _count(questions, replies)
    if not tally.num_kept:
        raise DataError(
            f"{settings.prompts}: none of the base's {tally.num_prompts} replies can be kept "
            f"({tally.rejections}); replay needs a base that answers in Qwen3's thinking form, "
            "within replay.max_tokens"
        )
    sound = [(q.prompt, replies[q.key].text) for q in questions if not replies[q.key].reason]
    lines = [json.dumps(conversation(*pair), ensure_ascii=False) for pair in sound]
    is_written = _write_if_new(run.replay, "".join(f"{line}\n" for line in lines))
    # Not only for news: an earlier run may have been stopped before it came to this.
    run.describe(replay=tally.facts())
    return tally, is_asked or is_written


def _question(prompt: Prompt, settings: Replay, seed: int, base_sha256: str) -> Question:
    prompt_sha256 = prompt.sha256
    own_seed = int(hash_value([seed, prompt_sha256])[:8], 16)
    sampling = Sampling(
        max_tokens=settings.max_tokens,
        **RECOMMENDED["thinking"],
        seed=own_seed,
        is_repeatable=True,
    )
    key = hash_value([base_sha256, settings.gguf, prompt_sha256, asdict(sampling)])
    return Question(prompt, sampling, key)


def _count(questions: Sequence[Question], replies: Mapping[str, Reply]) -> Tally:
    tally = Tally(len(questions))
    for question in questions:
        if question.key in replies:
            tally.count(replies[question.key])
    return tally


def _ask_missing(
    questions: Sequence[Question],
    replies: Mapping[str, Reply],
    settings: Replay,
    answerer: Answerer,
    run: Run,
    console: Console,
) -> None:
    journal, tally = Journal(run.replay_journal), _count(questions, replies)
    journal.repair()
    gguf = answerer.write_gguf()
    missing = [question for question in questions if question.key not in replies]
    # As for all of them, so that a run that was stopped is served as one that was not.
    room = max(len(question.prompt.ids) for question in questions) + settings.max_tokens

    async def ask() -> None:
        async with await LlamaCpp.start(
            gguf, slots=settings.parallel, context_tokens=room, log=run.folder / "engine.log"
        ) as engine:
            for question in missing:
                _refuse_if_too_long(question.prompt, engine)
            waiting = iter(missing)
            askers = (interview.ask_all(waiting, engine) for _ in range(settings.parallel))
            await asyncio.gather(*askers)

    with show_progress(tally, console) as show:
        interview = Interview(answerer.chat, journal, tally, show)
        asyncio.run(ask())


def _refuse_if_too_long(prompt: Prompt, engine: Engine) -> None:
    if len(prompt.ids) >= engine.context_tokens:
        what = f"the prompt has {len(prompt.ids)} tokens, the base holds {engine.context_tokens}"
        raise DataError.at(prompt.path, prompt.line, f"{what}; shorten or remove it")


@dataclass(frozen=True)
class Interview:
    """Asking, and what every reply changes."""

    chat: Chat
    journal: Journal
    tally: Tally
    show: Callable[[], None]

    async def ask_all(self, waiting: Iterator[Question], engine: Engine) -> None:
        """Ask one question after the other until none is left; others may take from the same."""
        for question in waiting:
            reply = await self._ask(question, engine)
            self.journal.append(reply)
            self.tally.count(reply)
            self.show()

    async def _ask(self, question: Question, engine: Engine) -> Reply:
        text, num_tokens = "", 0
        finish: Finish | None = None
        stream = engine.generate(question.prompt.ids, question.sampling)
        async with aclosing(stream):
            async for delta in stream:
                text += delta.text
                finish, num_tokens = delta.finish, delta.num_completion_tokens
                self.tally.num_new_tokens += delta.num_tokens
                self.show()
        reason = judge(question.prompt, text, finish, self.chat)
        return Reply(question.key, text, num_tokens, reason)


def _write_if_new(path: Path, text: str) -> bool:
    """Write a file unless it holds this text already; whether it was written."""
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    write_text(path, text)
    return True
