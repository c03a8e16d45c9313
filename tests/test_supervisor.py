"""An engine that outlives its process: warmed, watched, started again."""

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.engine import supervisor as module
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.logs import Logs
from pipeline.engine.protocol import PLAIN, Delta, Engine, Lane, Sampling
from pipeline.engine.supervisor import Supervisor, backoff_s
from pipeline.engine.warm import warm
from pipeline.errors import EngineDown, EngineError, EngineRefused

ONE = Sampling(max_tokens=1)


class Mortal(ScriptedEngine):
    """An engine that can be killed."""

    is_gone = False
    has_failed = False
    is_sick = False
    fails_with: EngineError | None = None

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, lane: Lane = PLAIN
    ) -> AsyncGenerator[Delta, None]:
        if self.fails_with is not None:
            raise self.fails_with
        async for delta in super().generate(prompt_ids, sampling, lane):
            yield delta

    async def is_healthy(self) -> bool:
        return not self.is_gone and not self.is_sick


class Starter:
    """Starts mortals, or fails as often as it is told to."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.started: list[Mortal] = []
        self.logs: list[Path] = []
        self.may_start = asyncio.Event()
        self.may_start.set()

    async def __call__(self, log: Path) -> Mortal:
        self.logs.append(log)
        await self.may_start.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.started.append(Mortal())
        return self.started[-1]


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


async def no_warming(_: Engine) -> None:
    """Nothing to warm."""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is waited for, at a hundredth of the time."""
    monkeypatch.setattr(module, "CHECK_S", 0.02)
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    monkeypatch.setattr(module, "_SETTLE_S", 0.001)
    monkeypatch.setattr(module, "backoff_s", lambda num_failures: 0.01 * num_failures)


@asynccontextmanager
async def supervising(
    start: Starter, warm_up: Callable[[Engine], Awaitable[None]] = no_warming
) -> AsyncGenerator[Supervisor, None]:
    supervisor = await Supervisor.start("it", start, warm_up, Logs("test", None))
    try:
        yield supervisor
    finally:
        await supervisor.close()


async def say(engine: Engine, sampling: Sampling = ONE) -> str:
    return "".join([delta.text async for delta in engine.generate([1], sampling)])


async def collect(deltas: AsyncGenerator[Delta, None]) -> list[Delta]:
    return [delta async for delta in deltas]


def kill_child() -> None:
    """The engine of this process, which may have other children."""
    children = psutil.Process().children()
    [engine] = [child for child in children if "pipeline.engine.llamacpp_child" in child.cmdline()]
    engine.kill()


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.005)


def test_a_dead_engine_is_started_again_and_asked(impatient: None) -> None:
    async def talk() -> None:
        start = Starter()
        async with supervising(start) as supervisor:
            assert (await say(supervisor), supervisor.state) == ("hello", "ready")
            start.started[0].is_gone = True
            await until(lambda: supervisor.num_restarts == 1)
            assert start.started[0].is_closed
            assert await say(supervisor) == "hello"
            assert [len(engine.asked) for engine in start.started] == [1, 1]

    asyncio.run(talk())


def test_a_request_waits_for_an_engine_that_is_about_to_be_there(
    impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 60)

    async def talk() -> None:
        start = Starter()
        async with supervising(start) as supervisor:
            start.started[0].is_gone = True
            assert await say(supervisor) == "hello"
            assert supervisor.num_restarts == 1

    asyncio.run(talk())


def test_while_it_is_down_requests_are_told_when_to_come_back(impatient: None) -> None:
    async def talk() -> None:
        start = Starter()
        async with supervising(start) as supervisor:
            start.may_start.clear()
            start.started[0].is_gone = True
            with pytest.raises(EngineDown, match="it is starting") as caught:
                await say(supervisor)
            assert caught.value.retry_after_s >= 1
            assert not await supervisor.is_healthy()

    asyncio.run(talk())


def test_starts_that_fail_are_tried_again_later_and_later(
    impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk() -> None:
        start = Starter()
        async with supervising(start) as supervisor:
            start.failures += [EngineError("no luck"), OSError("none either")]
            start.started[0].is_gone = True
            await until(lambda: len(start.started) == 2)
            await until(lambda: supervisor.state == "ready")
            assert supervisor.num_restarts == 1

    asyncio.run(talk())
    assert "no luck; next attempt" in caplog.text
    waits = [backoff_s(num_failures) for num_failures in range(9)]
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60]


def test_a_first_start_that_fails_is_not_tried_again() -> None:
    start = Starter(EngineError("no such model"))
    with pytest.raises(EngineError, match="no such model"):
        asyncio.run(Supervisor.start("it", start, no_warming, Logs("test", None)))
    assert len(start.logs) == 1


def test_nobody_meets_an_engine_that_is_not_warm_and_one_that_cannot_be_is_ended() -> None:
    async def too_cold(engine: Engine) -> None:
        assert isinstance(engine, Mortal)
        raise EngineError("it stays cold")

    async def talk() -> None:
        start = Starter()
        with pytest.raises(EngineError, match="it stays cold"):
            await Supervisor.start("it", start, too_cold, Logs("test", None))
        assert start.started[0].is_closed

    asyncio.run(talk())


def test_an_engine_that_says_nothing_is_dead_but_not_one_that_gives_tokens(impatient: None) -> None:
    async def talk() -> None:
        start = Starter()
        async with supervising(start) as supervisor:
            first = start.started[0]
            first.is_sick = True
            first.chunks, first.delay_s = ["x"] * 30, 0.01
            assert len(await say(supervisor, Sampling(max_tokens=100))) == 30
            assert supervisor.num_restarts == 0
            await until(lambda: supervisor.num_restarts == 1)
            assert first.is_closed

    asyncio.run(talk())


def test_a_refusal_is_no_reason_to_doubt_an_engine(impatient: None) -> None:
    async def talk() -> None:
        start = Starter()
        async with supervising(start) as supervisor:
            for error, doubts in ((EngineRefused("too long"), False), (EngineError("oh"), True)):
                start.started[0].fails_with = error
                with pytest.raises(EngineError, match=str(error)):
                    await say(supervisor)
                assert supervisor._suspected.is_set() == doubts

    asyncio.run(talk())


def test_an_engine_that_dies_while_draining_stays_dead(impatient: None) -> None:
    async def talk() -> None:
        start = Starter()
        async with supervising(start) as supervisor:
            supervisor.drain()
            assert (supervisor.state, await supervisor.is_healthy()) == ("draining", False)
            assert await say(supervisor) == "hello", "a reply under way may ask for more"
            start.started[0].is_gone = True
            with pytest.raises(EngineDown, match="it is draining"):
                await say(supervisor)
            assert len(start.started) == 1

    asyncio.run(talk())


def test_every_path_an_engine_has_is_warmed() -> None:
    poor, rich = ScriptedEngine(), ScriptedEngine(able=("logprobs", "grammar", "adapters"))
    for engine in (poor, rich):
        asyncio.run(warm(engine, [1, 2], ["a", "b"]))

    assert len(poor.lanes) == 1
    assert [lane.adapter for lane in rich.lanes] == [None, None, None, "a", "b"]
    asked = [entry[1] for entry in rich.asked]
    assert [(s.top_logprobs, s.grammar is None) for s in asked[:3]] == [
        (None, True),
        (1, True),
        (None, False),
    ]


def begun(logs: Logs) -> Path:
    """A log that says something."""
    log = logs.begin()
    log.write_text("hello")
    return log


def test_logs_lie_in_the_runs_folder_or_are_kept_only_on_failure(tmp_path: Path) -> None:
    run = Logs("llamacpp", tmp_path / "run" / "logs")
    made = [begun(run) for _ in range(30)]
    run.end(made[-1], has_failed=False)
    assert made[-1].is_file()
    assert len(list((tmp_path / "run" / "logs").iterdir())) == 20

    elsewhere = Logs("llamacpp", None)
    fine, failed, silent = begun(elsewhere), begun(elsewhere), elsewhere.begin()
    elsewhere.end(fine, has_failed=False)
    elsewhere.end(silent, has_failed=True)
    elsewhere.end(failed, has_failed=True)
    assert list(tmp_path.glob("*.log")) == [failed]


def test_llamacpp_killed_in_the_middle_of_a_reply_is_there_for_the_next(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    chat = Chat(tiny_gguf.parent)
    hello = chat.prompt_ids([{"role": "user", "content": "Hello"}], None, "direct")

    async def start(log: Path) -> LlamaCpp:
        return await LlamaCpp.start(tiny_gguf, slots=1, context_tokens=16384, log=log)

    async def warm_up(engine: Engine) -> None:
        await warm(engine, hello)

    async def talk() -> None:
        logs = Logs("llamacpp", tmp_path / "logs")
        supervisor = await Supervisor.start("llama.cpp", start, warm_up, logs)
        ends = {chat.end_of_turn_id: -100.0, chat.token_id("<|endoftext|>"): -100.0}
        long = Sampling(max_tokens=16000, logit_bias=ends)
        deltas = supervisor.generate(hello, long)
        await anext(deltas)
        kill_child()
        with pytest.raises(EngineError, match=r"llama\.cpp"):
            await collect(deltas)
        answer = await collect(supervisor.generate(hello, ONE))
        assert answer[-1].finish is not None
        assert supervisor.num_restarts == 1
        await supervisor.close()

    asyncio.run(talk())
    assert len(list((tmp_path / "logs").glob("engine-*.log"))) == 2
