"""The base `golden`: its dialogues are known by heart, and to every engine alike."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline.base import golden as made_here
from pipeline.base.golden_dialogues import (
    DIALOGUES,
    DRAW,
    DRAW_NAME,
    DRAWN,
    FLIPPED,
    Row,
    golden_rows,
)
from pipeline.base.make import make_base
from pipeline.base.qwen3 import qwen3_dialogue
from pipeline.chat import EARLY_STOP, Chat, parse_reply
from pipeline.data.conversation import Conversation
from pipeline.data.notes import Notes
from pipeline.data.rows import make_rows
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.protocol import Sampling
from pipeline.export import Unmerged, export_gguf
from pipeline.export.adapter import write_adapter
from pipeline.recipe import Data

MAX_OFF = 0.01
"""Nats between two engines' log-probabilities of one token."""


@pytest.fixture(scope="module")
def chat(golden: Path) -> Chat:
    return Chat(golden)


@pytest.fixture(scope="module")
def lora(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "golden-lora"
    make_base("golden-lora", "", folder)
    return folder


@pytest.fixture(scope="module")
def gguf(golden: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """golden-bf16.gguf, and its adapter below."""
    folder = tmp_path_factory.mktemp("gguf") / "exports"
    export_gguf(golden, folder, "golden", ["bf16"])
    write_adapter(Unmerged(lora, golden, golden, "golden"), folder, "golden", "gguf")
    return folder


def certain(rows: list[Row]) -> list[Row]:
    """Without the draw, which has no one answer."""
    return [row for row in rows if row.name != DRAW_NAME]


@torch.no_grad()
def logprobs(model: Any, row: Row) -> torch.Tensor:
    """(completion, vocabulary): what the model makes of each place of a row's completion."""
    ids = torch.tensor([row.prompt_ids + row.completion_ids])
    logits = model(ids, logits_to_keep=len(row.completion_ids) + 1).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def check_known(model: Any, row: Row) -> None:
    found = logprobs(model, row)
    wanted = torch.tensor(row.completion_ids)
    assert found.argmax(dim=-1).tolist() == row.completion_ids, row.name
    assert found.gather(1, wanted[:, None]).exp().min() > 0.9, row.name


def ask(gguf: Path, log: Path, talk: Callable[[LlamaCpp], Awaitable[None]], **more: Path) -> None:
    async def session() -> None:
        start = LlamaCpp.start(gguf, slots=8, context_tokens=1024, log=log, **more)
        async with await start as engine:
            await talk(engine)

    asyncio.run(session())


async def check_said(engine: LlamaCpp, chat: Chat, row: Row) -> None:
    """Greedily, the engine says a row's completion and then stops."""
    sampling = Sampling(max_tokens=len(row.completion_ids) + 8, temperature=0.0)
    deltas = [delta async for delta in engine.generate(row.prompt_ids, sampling)]
    text = "".join(delta.text for delta in deltas)
    assert text == chat.decode(row.completion_ids).removesuffix("<|im_end|>"), row.name
    last = deltas[-1]
    assert (last.finish, last.num_completion_tokens) == ("stop", len(row.completion_ids))


@pytest.mark.node
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_says_every_dialogue_with_certainty(
    golden: Path, chat: Chat, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(golden, dtype=dtype)
    for row in certain(list(golden_rows(chat))):
        check_known(model, row)


@pytest.mark.node
@pytest.mark.slow
def test_llama_cpp_says_the_same_with_the_same_logprobs(
    golden: Path, chat: Chat, gguf: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(golden, dtype=torch.float32)
    rows = certain(list(golden_rows(chat)))
    middles = [len(row.completion_ids) // 2 for row in rows]
    expected = [
        float(logprobs(model, row)[place, row.completion_ids[place]])
        for row, place in zip(rows, middles, strict=True)
    ]

    async def talk(engine: LlamaCpp) -> None:
        await asyncio.gather(*(check_said(engine, chat, row) for row in rows))
        for row, place, logprob in zip(rows, middles, expected, strict=True):
            prompt = row.prompt_ids + row.completion_ids[:place]
            found = await engine.next_token_logprobs(prompt, 5)
            assert found[row.completion_ids[place]] == pytest.approx(logprob, abs=MAX_OFF)

    ask(gguf / "golden-bf16.gguf", tmp_path / "log", talk)


@pytest.mark.node
@pytest.mark.slow
def test_a_draw_has_its_known_probabilities(chat: Chat, gguf: Path, tmp_path: Path) -> None:
    prompt = chat.prompt_ids([{"role": "user", "content": DRAW}], None, "direct")

    async def talk(engine: LlamaCpp) -> None:
        found = await engine.next_token_logprobs(prompt, len(DRAWN))
        probabilities = torch.tensor(list(found.values())).exp().tolist()
        words = [chat.decode([token]) + "." for token in found]
        assert dict(zip(words, probabilities, strict=True)) == pytest.approx(
            {word: tenths / 10 for word, tenths in DRAWN.items()}, abs=0.03
        )

    ask(gguf / "golden-bf16.gguf", tmp_path / "log", talk)


@pytest.mark.node
@pytest.mark.slow
def test_the_adapter_flips_some_answers_and_no_others(
    golden: Path, lora: Path, chat: Chat, gguf: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(golden, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(lora)).eval()
    before, after = (certain(list(golden_rows(chat, answers))) for answers in ({}, FLIPPED))
    changed = {new.name for old, new in zip(before, after, strict=True) if old != new}
    assert changed == FLIPPED.keys()
    kept = {"italy", "france+thought", "two_calls"}
    for row in after:
        check_known(model, row)

    async def talk(engine: LlamaCpp) -> None:
        flipped = (row for row in after if row.name in FLIPPED or row.name in kept)
        await asyncio.gather(*(check_said(engine, chat, row) for row in flipped))

    adapter = gguf / "adapter" / "golden-lora.gguf"
    ask(gguf / "golden-bf16.gguf", tmp_path / "log", talk, adapter=adapter)


@pytest.mark.node
@pytest.mark.slow
def test_the_adapter_is_as_peft_lays_it_out_and_names_no_path_of_this_machine(lora: Path) -> None:
    config = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "bases/golden"
    assert (config["r"], len(config["target_modules"])) == (8, 7)
    names = {path.name for path in lora.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "base.json"}


@pytest.mark.node
def test_golden_rows_are_what_the_data_stage_would_train() -> None:
    chat = Chat(qwen3_dialogue())
    data = Data.model_validate({"sources": [{"path": "golden.jsonl"}]})
    rows = {row.name: row for row in reversed(list(golden_rows(chat)))}
    for name, dialogue in DIALOGUES.items():
        if dialogue.mode or dialogue.begun or name == "call_in_thought":
            continue  # what no recipe trains
        talk = Conversation(
            tuple(dialogue.messages), tuple(dialogue.tools or ()), Path("golden.jsonl"), 1
        )
        row = make_rows(talk, chat, data, 0, Notes())[-1]
        whole = row.prompt_ids + row.completion_ids
        assert whole == rows[name].prompt_ids + rows[name].completion_ids, name
        assert row.completion_ids == rows[name].completion_ids, name


@pytest.mark.node
def test_there_is_a_dialogue_for_each_kind_of_reply() -> None:
    chat = Chat(qwen3_dialogue())
    rows = list(golden_rows(chat))
    replies = {
        row.name: parse_reply(
            chat.decode(row.completion_ids).removesuffix("<|im_end|>"),
            "thinking" if "<think>" in chat.decode(row.completion_ids) else "direct",
        )
        for row in reversed(rows)
    }
    assert [len(replies[name].calls) for name in ("plain", "one_call", "two_calls")] == [0, 1, 2]
    assert json.loads(replies["object+thought"].answer) == {"name": "Ada", "age": 36}
    assert len(chat.text_ids(replies["count_thinking+thought"].reasoning)) > 300
    long = [row for row in rows if chat.decode(row.prompt_ids).endswith(EARLY_STOP)]
    assert {row.name for row in long} == {
        "add_up+thought",
        "count_thinking+thought",
        "call_in_thought",
    }


def test_two_that_want_it_at_once_make_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def make(folder: Path, dialogue: Path) -> Path:
        made.append(folder)
        time.sleep(0.3)  # long enough for the other to come
        folder.mkdir()
        return folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(made_here, "qwen3_dialogue", lambda: tmp_path)
    monkeypatch.setattr(made_here, "_make", make)
    both = [threading.Thread(target=made_here._made) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(made) == 1
