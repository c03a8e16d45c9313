"""The engine over the real vLLM; what needs no vLLM to be seen is in test_vllm_dialect."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_golden import MAX_OFF, certain, check_said, logprobs
from transformers import AutoModelForCausalLM

from pipeline.base.golden_dialogues import DRAW, FLIPPED, Row, golden_rows
from pipeline.base.make import make_base
from pipeline.base.yarn import read_config, under_yarn
from pipeline.chat import CALL, END_CALL, END_THINK, Chat
from pipeline.engine.protocol import PLAIN, Delta, Lane, Sampling, StopToken
from pipeline.engine.vllm import Vllm
from pipeline.errors import EngineError, EngineRefused

pytestmark = [pytest.mark.vllm, pytest.mark.node, pytest.mark.slow]

LORA = Lane(adapter="local/golden-lora")


class Running:
    """An engine, and the loop in another thread that it lives in: a start takes half a minute."""

    def __init__(self, **arguments: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.engine = self.run(Vllm.start(**arguments))
        child = self.engine.connection.child
        assert child is not None
        self.child = child

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def gather(self, prompt_ids: list[int], sampling: Sampling, lane: Lane = PLAIN) -> list[Delta]:
        async def collect() -> list[Delta]:
            return [delta async for delta in self.engine.generate(prompt_ids, sampling, lane)]

        found: list[Delta] = self.run(collect())
        return found

    def processes(self) -> list[psutil.Process]:
        """Of the child's group, which all that it has started belong to."""
        group = self.child.process.pid
        return [process for process in psutil.process_iter() if _is_in(process, group)]

    async def num_running(self) -> float:
        session = self.engine.connection._session
        async with session.get("http://vllm/metrics") as response:
            (value,) = re.findall(
                r"^vllm:num_requests_running{.*} (.*)$", await response.text(), re.M
            )
        return float(value)


def _is_in(process: psutil.Process, group: int) -> bool:
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def running(model: Path, log: Path, **more: Any) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        ours = Running(model=model, slots=32, log=log, **more)
    try:
        yield ours
    finally:
        ours.run(ours.engine.close())
    _wait_until_none(ours)
    assert not ours.child.folder.exists()
    ours.loop.call_soon_threadsafe(ours.loop.stop)
    ours.thread.join()
    ours.loop.close()


def _wait_until_none(ours: Running) -> None:
    """A killed process takes a moment to be gone."""
    deadline_s = time.monotonic() + 10
    while ours.processes():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


@pytest.fixture(scope="module")
def chat(golden: Path) -> Chat:
    return Chat(golden)


@pytest.fixture(scope="module")
def rows(chat: Chat) -> list[Row]:
    return certain(list(golden_rows(chat)))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "golden-lora"
    make_base("golden-lora", "", folder)
    return folder


@pytest.fixture(scope="module")
def ours(golden: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("vllm") / "log"
    adapters = {LORA.adapter: lora}
    with running(golden, log, context_tokens=4096, adapters=adapters) as found:
        yield found


@pytest.fixture(scope="module")
def long(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`golden` under YaRN."""
    folder = tmp_path_factory.mktemp("bases") / "long"
    shutil.copytree(golden, folder)
    config = under_yarn(read_config(golden), 32768, 4.0)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def named(rows: list[Row], name: str) -> Row:
    return next(row for row in rows if row.name == name)


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def greedy(max_tokens: int = 60, **more: Any) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, **more)


def test_it_says_what_transformers_says_with_the_same_logprobs(
    ours: Running, golden: Path, chat: Chat, rows: list[Row]
) -> None:
    async def say_all() -> None:
        await asyncio.gather(*(check_said(ours.engine, chat, row) for row in rows))

    ours.run(say_all())
    model = AutoModelForCausalLM.from_pretrained(golden, dtype=torch.float32)
    for row in rows:
        deltas = ours.gather(row.prompt_ids, greedy(400, top_logprobs=2))
        found = [place for delta in deltas for place in delta.logprobs]
        assert [id for delta in deltas for id in delta.ids] == row.completion_ids[:-1], row.name
        assert [place.id for place in found] == row.completion_ids[:-1], row.name
        expected = logprobs(model, row)
        for place, likely in zip(found, expected, strict=False):
            assert place.top[0] == (place.id, place.logprob)
            assert len(place.top) == 2
            assert place.logprob == pytest.approx(float(likely[place.id]), abs=MAX_OFF)
        first = ours.run(ours.engine.next_token_logprobs(row.prompt_ids, 30))
        assert list(first.values()) == sorted(first.values(), reverse=True)
        assert len(first) == 30
        assert first[row.completion_ids[0]] == pytest.approx(
            float(expected[0, row.completion_ids[0]]), abs=MAX_OFF
        )


def test_logprobs_are_from_before_temperature_and_cuts(ours: Running, chat: Chat) -> None:
    prompt = chat.prompt_ids([{"role": "user", "content": DRAW}], None, "direct")
    plain = ours.gather(prompt, greedy(1, top_logprobs=4))[-1].logprobs[0].top
    hot = Sampling(1, temperature=1.9, top_k=1, presence_penalty=2.0, top_logprobs=4)
    found = ours.gather(prompt, hot)[-1].logprobs[0].top
    assert dict(found) == pytest.approx(dict(plain))


def test_adapters_answer_side_by_side_and_come_and_go(
    ours: Running, lora: Path, chat: Chat, rows: list[Row]
) -> None:
    row = named(rows, "sum")
    base = chat.decode(row.completion_ids).removesuffix("<|im_end|>")

    async def say(lane: Lane) -> str:
        return text([delta async for delta in ours.engine.generate(row.prompt_ids, greedy(), lane)])

    async def say_all() -> list[str]:
        return await asyncio.gather(*(say(lane) for lane in [LORA, PLAIN] * 5))

    assert ours.run(say_all()) == [FLIPPED["sum"], base] * 5
    late = Lane(adapter="another/one")
    with pytest.raises(EngineError, match="another/one"):
        ours.run(say(late))
    ours.run(ours.engine.load_adapter("another/one", lora))
    assert ours.run(say(late)) == FLIPPED["sum"]
    ours.run(ours.engine.unload_adapter("another/one"))
    with pytest.raises(EngineError, match="another/one"):
        ours.run(say(late))
    with pytest.raises(EngineError, match="vLLM refused"):
        ours.run(ours.engine.load_adapter("third/one", lora / "missing"))


def test_a_stop_token_ends_it_and_is_counted_but_neither_text_nor_id(
    ours: Running, chat: Chat, rows: list[Row]
) -> None:
    row = named(rows, "france+thought")
    end = chat.token_id(END_THINK)
    wanted = row.completion_ids[: row.completion_ids.index(end)]
    deltas = ours.gather(row.prompt_ids, greedy(stop_tokens=(StopToken(end, END_THINK),)))
    assert text(deltas) == chat.decode(wanted)
    assert [id for delta in deltas for id in delta.ids] == wanted
    last = deltas[-1]
    assert (last.finish, last.stop_id, last.num_completion_tokens) == ("stop", end, len(wanted) + 1)
    assert sum(delta.num_tokens for delta in deltas) == len(wanted) + 1
    whole = ours.gather(row.prompt_ids, greedy())[-1]
    assert (whole.finish, whole.stop_id) == ("stop", None)


def test_the_other_end_of_a_turn_ends_it_too(ours: Running, chat: Chat, rows: list[Row]) -> None:
    other = chat.token_id("<|endoftext|>")
    deltas = ours.gather(named(rows, "sum").prompt_ids, greedy(logit_bias={other: 100.0}))
    assert (text(deltas), deltas[-1].finish, deltas[-1].stop_id) == ("", "stop", None)
    assert (deltas[-1].ids, deltas[-1].num_completion_tokens) == ((), 1)


def test_no_character_is_cut_in_two(ours: Running, chat: Chat, rows: list[Row]) -> None:
    row = named(rows, "unicode")
    for size in range(1, 14):
        deltas = ours.gather(row.prompt_ids, greedy(size))
        said = chat.decode(row.completion_ids[:size])
        assert text(deltas) == said.rstrip("\N{REPLACEMENT CHARACTER}").rstrip(" "), size
        assert (deltas[-1].finish, deltas[-1].num_completion_tokens) == ("length", size)


def test_a_grammar_holds_special_tokens_and_schemas(
    ours: Running, chat: Chat, rows: list[Row]
) -> None:
    row = named(rows, "one_call")
    schema = {
        "type": "object",
        "properties": {"name": {"const": "get_time"}, "arguments": {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False, "key_separator": ": "},
    }
    call = f'<[{chat.token_id(CALL)}]> "\\n" body "\\n" <[{chat.token_id(END_CALL)}]>'
    found = ours.gather(
        row.prompt_ids, greedy(grammar=f"start: {call}\nbody: %json {json.dumps(schema)}")
    )
    assert text(found).startswith(f'{CALL}\n{{"name": "get_time","arguments": {{"city')
    assert text(found).endswith(f"\n{END_CALL}")
    assert (found[-1].finish, found[-1].stop_id) == ("stop", None)
    assert json.loads(text(found).removeprefix(CALL).removesuffix(END_CALL))["arguments"]
    by_name = ours.gather(row.prompt_ids, greedy(grammar=f'start: {CALL} "x"'))
    assert by_name[0].ids[0] == chat.token_id(CALL)
    with pytest.raises(EngineRefused, match="unknown name"):
        ours.gather(row.prompt_ids, greedy(grammar="start: nothing"))


def test_every_parameter_of_sampling_acts(ours: Running, chat: Chat, rows: list[Row]) -> None:
    prompt = chat.prompt_ids([{"role": "user", "content": DRAW}], None, "direct")

    def draws(num: int = 12, **more: Any) -> set[str]:
        seeded = (Sampling(1, **({"seed": seed} | more)) for seed in range(num))
        return {text(ours.gather(prompt, sampling)) for sampling in seeded}

    assert len(draws()) > 1
    for alone in ({"seed": 3}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert len(draws(**alone)) == 1, alone
    blue = chat.encode("Blue")[0]
    assert draws(logit_bias={blue: 100.0}) == {"Blue"}
    row, comma = named(rows, "count"), chat.encode(",")[0]
    deltas = ours.gather(row.prompt_ids, greedy(top_logprobs=2))
    plain, places = text(deltas), [place for delta in deltas for place in delta.logprobs]
    lead = min(place.top[0][1] - place.top[1][1] for place in places if place.id == comma)
    close = {comma: 1.0 - lead}  # every comma wins, some by a hair
    assert text(ours.gather(row.prompt_ids, greedy(logit_bias=close))) == plain
    for penalty in ("frequency_penalty", "presence_penalty", "repetition_penalty"):
        sampling = greedy(logit_bias=close, **{penalty: 2.0})
        assert text(ours.gather(row.prompt_ids, sampling)) != plain, penalty
    assert text(ours.gather(row.prompt_ids, greedy(), Lane(priority=-3))) == plain


def test_what_is_cached_is_told_and_kept_apart_by_salt(ours: Running, rows: list[Row]) -> None:
    row = named(rows, "two_calls")

    def cached(lane: Lane, **more: Any) -> int:
        return ours.gather(row.prompt_ids, greedy(2, **more), lane)[-1].num_cached_tokens

    one, other = Lane(cache_salt="one"), Lane(cache_salt="other")
    assert cached(one) == 0
    assert cached(one) > 100
    assert cached(other) == 0
    assert cached(one, is_repeatable=True) == 0


def test_closing_the_generator_cancels(ours: Running, rows: list[Row]) -> None:
    async def leave() -> None:
        endless = Sampling(3000, temperature=2.0, logit_bias={151645: -100.0, 151643: -100.0})
        deltas = ours.engine.generate(rows[0].prompt_ids, endless)
        async with contextlib.aclosing(deltas):
            await anext(deltas)
            assert await ours.num_running() == 1
        deadline_s = time.monotonic() + 5
        while await ours.num_running():
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.05)

    ours.run(leave())


def test_what_it_will_not_do_is_one_sentence(ours: Running) -> None:
    with pytest.raises(EngineRefused, match="4096"):
        ours.gather([5] * 5000, greedy())
    with pytest.raises(EngineRefused, match="vocab"):
        ours.gather([5], greedy(logit_bias={999_999: 1.0}))
    assert ours.run(ours.engine.is_healthy())


def test_under_yarn_it_has_the_whole_context_and_dies_in_one_sentence(
    long: Path, chat: Chat, rows: list[Row], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(long, dtype=torch.float32)
    row = named(rows, "count_thinking+thought")
    with running(long, tmp_path / "log", context_tokens=None) as ours:
        assert ours.engine.context_tokens == 131_072
        assert "adapters" not in ours.engine.capabilities
        deltas = ours.gather(row.prompt_ids, greedy(9, top_logprobs=0))
        found = [place.logprob for delta in deltas for place in delta.logprobs]
        wanted = [logprobs(model, row)[n, id] for n, id in enumerate(row.completion_ids[:9])]
        assert found == pytest.approx([float(value) for value in wanted], abs=MAX_OFF)

        assert len(ours.processes()) > 2
        ours.run(_is_killed_while_it_says(ours, row))
        _wait_until_none(ours)  # the guard ends the others without being asked
        assert not ours.run(ours.engine.is_healthy())
        assert ours.engine.is_gone


async def _is_killed_while_it_says(ours: Running, row: Row) -> None:
    deltas = ours.engine.generate(row.prompt_ids, greedy(3000, logit_bias={151645: -100.0}))
    async with contextlib.aclosing(deltas):
        await anext(deltas)
        os.kill(ours.child.process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="see "):
            async for _ in deltas:
                pass
    await ours.child.process.wait()


def test_what_does_not_start_says_why(golden: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(EngineError, match=r"max_model_len \(90000\) is greater .*; see .*log$"):
        asyncio.run(
            Vllm.start(
                golden, slots=1, context_tokens=None, log=log, options=["--max-model-len", "90000"]
            )
        )
