"""What llama.cpp is asked for and gives, with a model that knows its dialogues by heart."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.golden_dialogues import FLIPPED, TOOLS, Row, golden_rows
from pipeline.base.make import make_base
from pipeline.chat import CALL, END_CALL, END_THINK, Chat
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.protocol import PLAIN, Delta, Lane, Sampling, StopToken
from pipeline.errors import EngineError
from pipeline.export import Unmerged, export_gguf
from pipeline.export.adapter import write_adapter
from pipeline.serve.asking.grammar import (
    Function,
    Tags,
    either,
    json_object,
    json_schema,
    tool_calls,
)

pytestmark = [pytest.mark.node, pytest.mark.slow]
GREEDY = Sampling(max_tokens=80, temperature=0.0)
PIRATE = Lane(adapter="pirate")


@pytest.fixture(scope="module")
def chat(golden: Path) -> Chat:
    return Chat(golden)


@pytest.fixture(scope="module")
def rows(chat: Chat) -> dict[str, Row]:
    return {row.name: row for row in reversed(list(golden_rows(chat)))}


@pytest.fixture(scope="module")
def exports(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """golden-bf16.gguf, and its adapter below."""
    folder = tmp_path_factory.mktemp("gguf")
    make_base("golden-lora", "", folder / "golden-lora")
    export_gguf(golden, folder / "exports", "golden", ["bf16"])
    unmerged = Unmerged(folder / "golden-lora", golden, golden, "golden")
    write_adapter(unmerged, folder / "exports", "golden", "gguf")
    return folder / "exports"


Ask = Callable[[Callable[[LlamaCpp], Awaitable[None]]], None]


@pytest.fixture
def ask(exports: Path, tmp_path: Path) -> Ask:
    """Talk to an engine that has the adapter as `pirate`."""

    def run(talk: Callable[[LlamaCpp], Awaitable[None]]) -> None:
        async def session() -> None:
            async with await LlamaCpp.start(
                exports / "golden-bf16.gguf",
                slots=3,
                context_tokens=4096,
                log=tmp_path / "log",
                adapters={"pirate": exports / "adapter" / "golden-lora.gguf"},
            ) as engine:
                await talk(engine)

        asyncio.run(session())

    return run


async def reply(
    engine: LlamaCpp, prompt_ids: list[int], sampling: Sampling = GREEDY, lane: Lane = PLAIN
) -> Delta:
    """All deltas as one."""
    deltas = [delta async for delta in engine.generate(prompt_ids, sampling, lane)]
    assert sum(delta.num_tokens for delta in deltas) == deltas[-1].num_completion_tokens
    return deltas[-1]._replace(
        text="".join(delta.text for delta in deltas),
        ids=tuple(token for delta in deltas for token in delta.ids),
        logprobs=tuple(token for delta in deltas for token in delta.logprobs),
    )


def said(chat: Chat, row: Row) -> str:
    return chat.decode(row.completion_ids).removesuffix("<|im_end|>")


def test_replies_under_several_adapters_at_once_never_mix(
    ask: Ask, chat: Chat, rows: dict[str, Row]
) -> None:
    async def check(engine: LlamaCpp, name: str, lane: Lane) -> None:
        wanted = FLIPPED[name] if lane.adapter else said(chat, rows[name])
        assert (await reply(engine, rows[name].prompt_ids, lane=lane)).text == wanted

    async def talk(engine: LlamaCpp) -> None:
        assert "adapters" in engine.capabilities
        jobs = [(name, lane) for name in FLIPPED for lane in (PLAIN, PIRATE, PIRATE, PLAIN)]
        for _ in range(4):  # what is cached of a prompt is that lane's own, too
            await asyncio.gather(*(check(engine, name, lane) for name, lane in jobs))
        prompt = rows["france"].prompt_ids + rows["france"].completion_ids[:5]
        fresh = await engine.next_token_logprobs(prompt, 1, is_repeatable=True)
        await reply(engine, prompt, lane=PIRATE)
        assert await engine.next_token_logprobs(prompt, 1) == pytest.approx(fresh, abs=0.01)
        with pytest.raises(EngineError, match="has no adapter parrot"):
            await reply(engine, prompt, lane=Lane(adapter="parrot"))

    ask(talk)


def test_a_stop_token_ends_a_reply_and_is_only_counted(
    ask: Ask, chat: Chat, rows: dict[str, Row]
) -> None:
    think, call = (StopToken(chat.token_id(text), text) for text in (END_THINK, CALL))

    async def check(engine: LlamaCpp, name: str, stop: StopToken | None) -> None:
        ids = rows[name].completion_ids
        end = ids.index(stop.id if stop else chat.end_of_turn_id)
        given = await reply(
            engine, rows[name].prompt_ids, replace(GREEDY, stop_tokens=(think, call))
        )
        assert (given.finish, given.stop_id) == ("stop", stop.id if stop else None)
        assert list(given.ids) == ids[:end]
        assert given.text == chat.decode(ids[:end])
        assert given.num_completion_tokens == end + 1

    async def talk(engine: LlamaCpp) -> None:
        await check(engine, "france+thought", think)
        await check(engine, "one_call", call)
        await check(engine, "france", None)
        cut = await reply(engine, rows["france"].prompt_ids, replace(GREEDY, max_tokens=3))
        assert (cut.finish, cut.stop_id) == ("length", None)
        assert list(cut.ids) == rows["france"].completion_ids[:3]

    ask(talk)


def test_log_probabilities_are_of_the_texts_tokens(
    ask: Ask, chat: Chat, rows: dict[str, Row]
) -> None:
    stops = (StopToken(chat.token_id(END_THINK), END_THINK),)

    async def talk(engine: LlamaCpp) -> None:
        for name in ("france", "sum", "france+thought"):
            sampling = replace(GREEDY, top_logprobs=2, stop_tokens=stops)
            given = await reply(engine, rows[name].prompt_ids, sampling)
            assert [token.id for token in given.logprobs] == list(given.ids)
            for token in given.logprobs:
                assert len(token.top) == 2
                assert token.top[0] == (token.id, token.logprob)
                assert -0.2 < token.logprob <= 0
            alone = await reply(engine, rows[name].prompt_ids, replace(sampling, top_logprobs=0))
            assert [token.top for token in alone.logprobs] == [()] * len(given.ids)
        prompt = rows["sum"].prompt_ids
        (drawn,) = (
            await reply(engine, prompt, Sampling(1, temperature=2.0, top_logprobs=1, seed=1))
        ).logprobs
        expected = await engine.next_token_logprobs(prompt, 1)
        assert drawn.top[0][1] == pytest.approx(next(iter(expected.values())), abs=0.01)

    ask(talk)


def test_of_a_character_made_of_several_tokens_the_last_is_given(
    ask: Ask, chat: Chat, rows: dict[str, Row]
) -> None:
    row = rows["unicode"]

    async def talk(engine: LlamaCpp) -> None:
        given = await reply(engine, row.prompt_ids, replace(GREEDY, top_logprobs=1))
        assert given.text == said(chat, row)
        whole = iter(row.completion_ids)
        assert all(token in whole for token in given.ids), "the same order"
        assert len(given.ids) < len(row.completion_ids) - 1
        assert [token.id for token in given.logprobs] == list(given.ids)
        assert given.num_completion_tokens == len(row.completion_ids)

    ask(talk)


def test_logit_bias_acts(ask: Ask, chat: Chat, rows: dict[str, Row]) -> None:
    paris = chat.encode(" Paris")[0]

    async def talk(engine: LlamaCpp) -> None:
        prompt = rows["france"].prompt_ids
        assert " Paris" in (await reply(engine, prompt)).text
        banned = await reply(engine, prompt, replace(GREEDY, logit_bias={paris: -100}))
        assert " Paris" not in banned.text
        forced = await reply(engine, prompt, Sampling(3, temperature=0.0, logit_bias={paris: 100}))
        assert forced.text == " Paris" * 3

    ask(talk)


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "country": {"type": "string"},
        "sea": {"type": "boolean"},
        "near": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city", "country", "sea", "near"],
    "additionalProperties": False,
}


def functions(*names: str) -> list[Function]:
    found = [tool["function"] for tool in TOOLS]
    return [
        Function(tool["name"], tool["parameters"], "here")
        for tool in found
        if not names or tool["name"] in names
    ]


def test_a_grammar_lets_the_model_say_what_it_would_have_said(
    ask: Ask, chat: Chat, rows: dict[str, Row]
) -> None:
    tags = Tags.of(chat)
    form, either_way = json_schema(SCHEMA, "here"), either(json_object(), several(tags), tags)
    one = tool_calls(functions(), tags, parallel=False)
    named = tool_calls(functions("get_time"), tags, parallel=False)

    async def talk(engine: LlamaCpp) -> None:
        for name, begun, grammar in (
            ("object", "", json_object()),
            ("schema", "", form),
            ("object", "", either_way),
            ("one_call", "", either_way),
            ("two_calls", "", either_way),
            ("one_call", CALL, one),
            ("two_calls", CALL, several(tags)),
            ("required", "", one),
        ):
            row, given = rows[name], chat.encode(begun)
            sampling = replace(GREEDY, grammar=grammar.text)
            said_now = await reply(engine, row.prompt_ids + given, sampling)
            wanted = row.completion_ids[len(given) :]
            assert list(said_now.ids) == wanted[:-1], name
            assert said_now.finish == "stop"
            assert said_now.num_completion_tokens == len(wanted), "then the turn ends"
        sampling = replace(GREEDY, grammar=named.text)
        call = await reply(engine, rows["required"].prompt_ids, sampling)
        assert call.text == '\n{"name": "get_time", "arguments": {"city": "Oslo"}}\n</tool_call>'

    ask(talk)


def several(tags: Tags) -> Any:
    return tool_calls(functions(), tags, parallel=True)


def test_a_grammar_holds_against_the_models_will(
    ask: Ask, chat: Chat, rows: dict[str, Row]
) -> None:
    tags, end = Tags.of(chat), chat.token_id(END_CALL)
    against = {end: -100.0, chat.encode("\n")[0]: 30.0}

    async def talk(engine: LlamaCpp) -> None:
        sampling = replace(GREEDY, grammar=json_schema(SCHEMA, "here").text, logit_bias=against)
        form = await reply(engine, rows["object"].prompt_ids, replace(sampling, max_tokens=400))
        assert "\n" not in form.text
        if form.finish == "stop":
            assert set(json.loads(form.text)) == set(SCHEMA["required"])
        grammar = tool_calls(functions(), tags, parallel=False).text
        call = await reply(
            engine,
            rows["required"].prompt_ids,
            replace(GREEDY, grammar=grammar, logit_bias=against),
        )
        assert call.ids[-1] == end, "the token itself, not its text"

    ask(talk)


async def wait_until_idle(engine: LlamaCpp) -> None:
    """No slot works; the replies in question would take far longer."""
    async with asyncio.timeout(30):
        while True:
            async with engine.connection._session.get("http://llama.cpp/slots") as response:
                if not any(slot["is_processing"] for slot in await response.json()):
                    return
            await asyncio.sleep(0.01)


def test_whoever_leaves_frees_the_slot(ask: Ask, chat: Chat, rows: dict[str, Row]) -> None:
    endless = Sampling(3000, temperature=1.5)
    situations: list[tuple[Sampling, Lane]] = [
        (endless, PLAIN),
        (endless, PIRATE),
        (replace(endless, top_logprobs=5), PLAIN),
        (replace(endless, grammar='start: "[" /[a-z ]/* "]"\n'), PLAIN),
        (replace(endless, stop_tokens=(StopToken(chat.token_id(END_THINK), END_THINK),)), PLAIN),
    ]

    async def leave(engine: LlamaCpp, sampling: Sampling, lane: Lane) -> None:
        async with aclosing(engine.generate(rows["draw"].prompt_ids, sampling, lane)) as deltas:
            await anext(deltas)

    async def leave_during_prefill(engine: LlamaCpp) -> None:
        prompt = chat.encode("One, two, three. ") * 600
        start = asyncio.create_task(
            anext(engine.generate(prompt[:4000], replace(endless, max_tokens=9)))
        )
        await asyncio.sleep(0.3)
        assert not start.done(), "it is still reading"
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start

    async def talk(engine: LlamaCpp) -> None:
        for sampling, lane in situations:
            await leave(engine, sampling, lane)
            await wait_until_idle(engine)
        await leave_during_prefill(engine)
        await wait_until_idle(engine)

    ask(talk)


def test_a_long_prompt_lets_other_replies_go_on(ask: Ask, chat: Chat, rows: dict[str, Row]) -> None:
    async def talk(engine: LlamaCpp) -> None:
        ends = {chat.end_of_turn_id: -100.0, chat.token_id("<|endoftext|>"): -100.0}
        endless = Sampling(3000, temperature=1.5, logit_bias=ends)
        deltas = engine.generate(rows["draw"].prompt_ids, endless)
        num_told = 0

        async def listen() -> None:
            nonlocal num_told
            async for _ in deltas:
                num_told += 1

        listening = asyncio.create_task(listen())
        while num_told < 3:
            await asyncio.sleep(0.01)
        before = num_told
        prompt = (chat.encode("One, two, three. ") * 600)[:3900]
        await reply(engine, prompt, Sampling(1, temperature=0.0))
        assert num_told - before >= 5  # it is read in fifteen batches
        assert not listening.done()
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await deltas.aclose()

    ask(talk)
