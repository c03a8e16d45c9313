"""Replay: what the base says is kept exactly or not at all, once, and the same every time."""

import asyncio
import io
import json
import logging
import shutil
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scripted import ScriptedEngine

from pipeline import cli
from pipeline.chat import END_OF_TURN, Chat
from pipeline.cli import preparing
from pipeline.data.conversation import Conversation, Record, is_trained
from pipeline.data.files import read_records
from pipeline.data.formats import detect, parse
from pipeline.data.notes import Notes
from pipeline.data.rows import Row, make_rows
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.protocol import Delta, Finish, Sampling
from pipeline.errors import DataError, EngineError, RunError
from pipeline.recipe import Data, Replay, Source
from pipeline.replay.journal import Journal, Reply
from pipeline.replay.judge import Reason, conversation, judge
from pipeline.replay.progress import Tally, show_progress
from pipeline.replay.prompts import Prompt, read_prompts
from pipeline.replay.stage import Answerer, replay
from pipeline.run import Run

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
NAMELESS: list[dict[str, Any]] = [{"function": {}}, {"function": {"name": []}}, {}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
OTHER = CALL.replace("weather", "wetter")
GOOD = "<think>\nOne and one.\n</think>\n\nIt is 2."


def called(city: str) -> str:
    return f"<think>\na\n</think>\n\n{CALL}".replace('"Zürich"', city)


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def after(*earlier: dict[str, Any]) -> str:
    return json.dumps({"messages": [*earlier, {"role": "user", "content": "?"}]})


def write_prompts(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_rows(file: Path, chat: Chat) -> list[Row]:
    """What the data stage makes of a source with its defaults."""
    data = Data(sources=(Source(path=str(file)),))
    rows = []
    for record in read_records(file):
        assert isinstance(record, Record)
        sample = parse(record, detect(record))
        assert isinstance(sample, Conversation)
        rows += make_rows(sample, chat, data, 0, Notes())
    return rows


def test_prompts_are_read_in_order_with_their_place_and_labels(tmp_path: Path, chat: Chat) -> None:
    rows = [user("Wie spät?", kind="time", language="de", id=7), user("And?", tools=[WEATHER])]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(rows[0], ensure_ascii=False) + "\r\n\n" + json.dumps(rows[1]))

    first, second = read_prompts(file, chat)

    assert (first.line, first.labels) == (1, {"kind": "time", "language": "de"})
    assert (second.line, second.labels, second.tool_names) == (3, {}, {"weather"})
    assert second.ids == chat.prompt_ids(rows[1]["messages"], [WEATHER], "thinking")
    assert first.sha256 != second.sha256


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[" * 100_000, "not JSON: it is nested too deeply"),
        ("[]", "a prompt must be a JSON object such as"),
        ('{"kind": "poem"}', "a prompt must be a JSON object such as"),
        ('{"messages": []}', "messages must be a list with at least one item"),
        ('{"messages": ["Hello"]}', "message 0 is not a JSON object"),
        ('{"messages": [{"role": "robot"}]}', "message 0: role 'robot' is none of"),
        ('{"messages": [{"role": "user", "content": 7}]}', "message 0: content must be text"),
        ('{"messages": [{"role": "user", "content": " "}]}', "the last message must be the user's"),
        ('{"messages": [{"role": "system", "content": "."}]}', "the last message must be the user"),
        (json.dumps(user("?", tools={"name": "a"})), "tools must be a list of JSON objects"),
        (json.dumps(user("?", tools=["a"])), "tools must be a list of JSON objects"),
        (json.dumps(user("\ud800")), "\\ud800 is half a character"),
        (after({"role": "user", "content": ".", "train": True}), "message 0: only assistant turns"),
        (after({"role": "assistant", "content": " "}), "message 0: an assistant turn with neither"),
        (after({"role": "assistant", "tool_calls": [7]}), "message 0: a tool call has no function"),
        (
            after({"role": "assistant", "function_call": {"name": "f", "arguments": "{a"}}),
            "message 0: a tool call's arguments are not a JSON object",
        ),
        (json.dumps(user("Hello?", kind="other")), "the prompt of line 1 once more; remove one"),
    ],
)
def test_a_line_that_cannot_be_asked_is_named(
    tmp_path: Path, chat: Chat, line: str, words: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{json.dumps(user('Hello?'))}\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_prompts(file, chat)
    assert str(caught.value).startswith(f"{file}:2: {words}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "r" * 10**6}]},
        {"messages": [{"role": "user", "content": [{"type": "t\n" * 10**6}]}]},
    ],
    ids=["role", "part"],
)
def test_a_fault_does_not_repeat_the_file(tmp_path: Path, chat: Chat, row: Any) -> None:
    file = write_prompts(tmp_path / "prompts.jsonl", row)
    with pytest.raises(DataError) as caught:
        read_prompts(file, chat)
    assert str(caught.value).startswith(f"{file}:1: message 0: ")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_the_prompts_here_can_all_be_asked(chat: Chat) -> None:
    prompts = read_prompts(Path(__file__).parents[1] / Replay().prompts, chat)
    assert len(prompts) >= 200
    assert all(set(prompt.labels) == {"kind", "language"} for prompt in prompts)


def test_a_file_that_is_none_is_one_sentence(tmp_path: Path, chat: Chat) -> None:
    (tmp_path / "latin").write_bytes(b"\xe4\n")
    (tmp_path / "empty").write_bytes(b"\n \n")
    for name, words in (
        ("latin", "latin:1: not UTF-8 text"),
        ("empty", "is empty"),
        ("gone", "gone is missing; replay.prompts must name a JSONL file"),
        ("", "Is a directory"),
    ):
        with pytest.raises(DataError, match=words):
            read_prompts(tmp_path / name, chat)


def prompt(chat: Chat, *, tools: Sequence[dict[str, Any]] = (), **labels: str) -> Prompt:
    messages = (
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "One and one?"},
    )
    ids = chat.prompt_ids(messages, tools, "thinking")
    return Prompt(messages, tuple(tools), labels, ids, Path("prompts.jsonl"), 1)


@pytest.mark.parametrize(
    ("text", "finish", "tools", "reason"),
    [
        (GOOD, "stop", [], None),
        (GOOD, "stop", [WEATHER], None),
        (f"<think>\na\n</think>\n\n{CALL}", "stop", [WEATHER], None),
        (f"<think>\na\n</think>\n\nI look.\n{CALL}\n{CALL}", "stop", [WEATHER], None),
        (f"<think>\na\n</think>\n\nI look.\n\n{CALL}\n", "stop", [WEATHER], None),
        (GOOD, "length", [], "unfinished"),
        (GOOD, None, [], "unfinished"),
        ("It is 2.", "stop", [], "malformed"),
        ("<think>\n\n</think>\n\nIt is 2.", "stop", [], "malformed"),
        ("<think>\na\n</think>\n\n", "stop", [], "malformed"),
        (f"{GOOD}</think>", "stop", [], "malformed"),
        (f"{GOOD}\ufffd", "stop", [], "malformed"),
        (f"{GOOD}<tool_call>\n{{}}\n</tool_call>", "stop", [WEATHER], "malformed"),
        ("<think>\n \n</think>\n\nIt is 2.", "stop", [], "blank"),
        (f"<think>\na\n</think>\n\n{CALL}", "stop", [], "foreign tool"),
        (f"<think>\na\n</think>\n\n{OTHER}", "stop", [WEATHER], "foreign tool"),
        (f"<think>\na\n</think>\n\n{CALL}", "stop", NAMELESS, "foreign tool"),
        (f"{GOOD}<|im_start|>user\nMore?", "stop", [], "control token"),
        (f"{GOOD}<tool_response>", "stop", [], "control token"),
        (f"<think>\na\n</think>\n\n{CALL}\nThere.", "stop", [WEATHER], "inexact"),
        (f"<think>\na\n</think>\n\n{CALL}".replace(": ", ":"), "stop", [WEATHER], "inexact"),
        (called("NaN"), "stop", [WEATHER], "malformed"),
        (called("[" * 150 + "]" * 150), "stop", [WEATHER], "inexact"),
        (called('"\\ud800"'), "stop", [WEATHER], "inexact"),
        (called("[null, 1e3]"), "stop", [WEATHER], "inexact"),
        (called("[null, 1.5]"), "stop", [WEATHER], None),
    ],
)
def test_a_reply_is_kept_or_its_fault_named(
    chat: Chat, text: str, finish: Finish, tools: list[dict[str, Any]], reason: Reason | None
) -> None:
    assert judge(prompt(chat, tools=tools), text, finish, chat) == reason


def test_a_tokenizer_that_composes_accents_costs_no_reply(
    chat_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(chat_folder, tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "NFC"}}))
    chat = Chat(tmp_path / "base")
    assert judge(prompt(chat), f"{GOOD} Voil\u0061\u0300.", "stop", chat) is None


def test_only_the_bases_own_reply_is_trained(chat: Chat) -> None:
    written = conversation(
        prompt(chat, tools=[WEATHER], kind="sum", language="en"),
        f"<think>\na\n</think>\n\nI look.\n{CALL}",
    )
    assert list(written) == ["messages", "tools", "kind", "language"]
    assert written["tools"] == [WEATHER]
    assert written["messages"][-1] == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "a",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Zürich"}'},
            }
        ],
    }
    sample = parse(Record(written, Path("replay.jsonl"), 1), "messages")
    assert isinstance(sample, Conversation)
    trained = [m for m in sample.messages if m["role"] == "assistant" and is_trained(m)]
    assert trained == [written["messages"][-1]]
    assert sample.tools == (WEATHER,)


breaks = ["\n", "\n\n", " ", "\r\n", "\x00", "{", "a"]
calls = [CALL, CALL.replace('"Zürich"', "NaN")]
tags = ["<think>", "</think>", "<tool_call>", "</tool_call>", *calls, END_OF_TURN, "<|im_start|>"]
letters = ["é", "e\u0301", "日本", "👩\u200d👩\u200d👧", "\U0010fffd"]
odd = st.sampled_from([*breaks, *tags, *letters])
texts = st.lists(odd | st.text(max_size=5), max_size=6).map("".join)


@given(reasoning=texts, answer=texts, has_tools=st.booleans())
@settings(deadline=None)
def test_what_is_kept_is_asked_and_learnt_as_it_was_said(
    chat: Chat,
    tmp_path_factory: pytest.TempPathFactory,
    reasoning: str,
    answer: str,
    has_tools: bool,
) -> None:
    text = f"<think>\n{reasoning}\n</think>\n\n{answer}"
    asked = prompt(chat, tools=[WEATHER] if has_tools else [])
    if judge(asked, text, "stop", chat) is not None:
        return
    file = tmp_path_factory.getbasetemp() / "kept.jsonl"
    [row] = train_rows(write_prompts(file, conversation(asked, text)), chat)
    assert row.mode == "thinking"
    assert row.prompt_ids == asked.ids
    learnt = chat.decode(row.completion_ids)
    assert learnt.replace("\n", "") == (text + END_OF_TURN).replace("\n", "")
    if "<tool_call>" not in text and not reasoning.endswith("\n"):
        assert learnt == text + END_OF_TURN


plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<�"), min_size=1)


@given(reasoning=plain.filter(str.strip), answer=plain.filter(str.strip))
def test_a_plain_reply_in_qwens_form_is_kept(chat: Chat, reasoning: str, answer: str) -> None:
    text = f"<think>\n{reasoning.strip()}\n</think>\n\n{answer.strip()}"
    assert judge(prompt(chat), text, "stop", chat) is None


Say = Callable[[str, Sampling], str]


def own_words(question: str, sampling: Sampling) -> str:
    return f"<think>\nSeed {sampling.seed}.\n</think>\n\nYou asked: {question}"


class ScriptedBase(ScriptedEngine):
    """What it says depends on the last question and the seed alone."""

    def __init__(self, chat: Chat, say: Say = own_words) -> None:
        super().__init__()
        self.chat, self.say = chat, say
        self.fails_after: int | None = None
        self.error: BaseException = EngineError("the scripted base has died")
        self.slots = 0

    async def __aenter__(self) -> "ScriptedBase":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def questions(self) -> list[str]:
        return [self._question(ids) for ids, _ in self.asked]

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Delta, None]:
        if len(self.asked) == self.fails_after:
            raise self.error
        self.asked.append((list(prompt_ids), sampling))
        question = self._question(prompt_ids)
        # The first one is the last to be finished.
        delay_s = 0.01 if question == "Question 0?" else 0.0
        words = self.say(question, sampling).partition("\n\n")
        async with aclosing(
            ScriptedEngine(words, delay_s=delay_s).generate(prompt_ids, sampling)
        ) as stream:
            async for delta in stream:
                yield delta

    def _question(self, prompt_ids: Sequence[int]) -> str:
        return self.chat.decode(prompt_ids).rpartition("user\n")[2].partition(END_OF_TURN)[0]


class Workplace:
    """A prompts file of five, a run folder, and what `replay` is given."""

    def __init__(self, folder: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.chat = folder, chat
        self.prompts = folder / "prompts.jsonl"
        self.ask_for(*(f"Question {i}?" for i in range(5)))
        self.base = ScriptedBase(chat)
        self.sha256 = "0" * 64
        self.num_written = 0

        async def start(gguf: Path, *, slots: int, context_tokens: int, log: Path) -> ScriptedBase:
            self.base.context_tokens = min(context_tokens, 1000)
            self.base.slots = slots
            return self.base

        monkeypatch.setattr(LlamaCpp, "start", start)

    def ask_for(self, *questions: str) -> None:
        write_prompts(self.prompts, *(user(q, kind="test") for q in questions))

    def replay(self, name: str = "mine", seed: int = 1, **settings: Any) -> tuple[Tally, bool]:
        """With a fresh record of what was asked."""
        self.base.asked.clear()

        def write_gguf() -> Path:
            self.num_written += 1
            return self.folder / "base.gguf"

        made = Replay(prompts=str(self.prompts), max_tokens=64).model_copy(update=settings)
        answerer = Answerer(self.chat, self.sha256, write_gguf)
        run = Run(self.folder / name)
        return replay(made, seed, answerer, run, Console(file=io.StringIO()))

    def read(self, name: str = "mine") -> list[dict[str, Any]]:
        lines = Run(self.folder / name).replay.read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def place(tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    return Workplace(tmp_path, chat, monkeypatch)


ALL = [f"Question {i}?" for i in range(5)]


@pytest.mark.parametrize("parallel", [1, 3])
def test_replies_are_written_in_the_prompts_order(place: Workplace, parallel: int) -> None:
    tally, is_new = place.replay(parallel=parallel)

    assert is_new
    assert place.base.slots == parallel
    assert str(tally) == f"kept 5 of 5; {tally.num_tokens} tokens"
    assert tally.num_tokens == 5 * 4
    assert [row["messages"][0]["content"] for row in place.read()] == ALL
    answers = [row["messages"][1]["content"] for row in place.read()]
    assert answers == [f"You asked: {question}" for question in ALL]
    assert {row["kind"] for row in place.read()} == {"test"}


def test_the_base_is_asked_as_qwen_recommends_with_a_seed_of_its_own(place: Workplace) -> None:
    place.replay()

    samplings = [sampling for _, sampling in place.base.asked]
    seeds = [sampling.seed for sampling in samplings]
    assert len(set(seeds)) == 5
    assert samplings == [
        Sampling(
            max_tokens=64,
            temperature=0.6,
            top_p=0.95,
            top_k=20,
            min_p=0.0,
            seed=seed,
            is_repeatable=True,
        )
        for seed in seeds
    ]
    longest = max(len(ids) for ids, _ in place.base.asked)
    assert place.base.context_tokens == longest + 64


def test_a_second_run_has_nothing_to_do(place: Workplace) -> None:
    first, _ = place.replay()
    second, is_new = place.replay()

    assert (second, is_new) == (first, False)
    assert place.base.asked == []
    assert place.num_written == 1


OLD_WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
OLD_CALL = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
    {"role": "function", "name": "weather", "content": "No."},
]
CACHED = WEATHER | {"cache_control": {"type": "ephemeral"}}
SAID = [{"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes?", "weight": 1}]
LAST = {"role": "user", "content": "Question?"}


@pytest.mark.parametrize(
    "row",
    [
        user("Question?", tools=[OLD_WEATHER]),
        user("Question?", functions=[OLD_WEATHER]),
        user("Question?", tools=json.dumps([WEATHER])),
        user("Question?", tools=[CACHED]),
        user("Question?", tools=NAMELESS),
        {"messages": [*OLD_CALL, LAST], "tools": [WEATHER]},
        {"messages": json.dumps([LAST]), "tools": None},
        {"messages": [{"role": "developer", "content": "Be kind."}, LAST, *SAID, LAST]},
        {"messages": [*SAID, {"role": "user", "content": [{"type": "text", "text": "Question?"}]}]},
    ],
)
def test_what_is_asked_is_what_the_data_stage_trains(place: Workplace, row: dict[str, Any]) -> None:
    write_prompts(place.prompts, row)
    place.replay()

    [(asked_ids, _)] = place.base.asked
    [trained] = train_rows(Run(place.folder / "mine").replay, place.chat)
    assert trained.prompt_ids == asked_ids
    said = own_words("Question?", place.base.asked[0][1])
    assert place.chat.decode(trained.completion_ids) == said + END_OF_TURN


def test_an_older_tool_may_be_called(place: Workplace) -> None:
    write_prompts(place.prompts, user("Question?", tools=[OLD_WEATHER]))
    place.base.say = lambda *_: f"<think>\na\n</think>\n\n{CALL}"
    tally, _ = place.replay()
    assert tally.num_kept == 1


def test_two_prompts_with_one_seed_are_two_questions(place: Workplace) -> None:
    place.ask_for("Riddle 46853?", "Riddle 125190?")
    tally, _ = place.replay(seed=1)

    assert len({sampling.seed for _, sampling in place.base.asked}) == 1, "choose other riddles"
    assert len(place.base.asked) == tally.num_kept == 2
    answers = [row["messages"][1]["content"] for row in place.read()]
    assert answers == ["You asked: Riddle 46853?", "You asked: Riddle 125190?"]


def test_asking_all_again_is_something_done_even_if_the_text_is_the_same(place: Workplace) -> None:
    place.replay()
    run = Run(place.folder / "mine")
    before = run.replay.read_bytes()
    run.replay_journal.unlink()

    assert place.replay()[1]
    assert place.base.questions == ALL
    assert run.replay.read_bytes() == before


def test_a_run_stopped_before_it_was_described_is_described(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr(Run, "describe", interrupt)
        with pytest.raises(KeyboardInterrupt):
            place.replay()
    run = Run(place.folder / "mine")
    assert run.replay.is_file()
    assert run.facts() == {"stages": {}}

    tally, is_new = place.replay()
    assert not is_new
    assert run.facts()["replay"] == tally.facts()


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_lost_file_is_written_again_without_asking(place: Workplace) -> None:
    place.replay()
    file = place.folder / "mine" / "replay.jsonl"
    before = file.read_bytes()
    file.unlink()

    assert place.replay()[1]
    assert file.read_bytes() == before
    assert place.base.asked == []


@pytest.mark.parametrize("num_finished", range(5))
@pytest.mark.parametrize("error", [EngineError("died"), KeyboardInterrupt()], ids=repr)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    place: Workplace, num_finished: int, error: BaseException
) -> None:
    place.replay("whole")
    place.base.fails_after, place.base.error = num_finished, error
    with pytest.raises(type(error)):
        place.replay()
    assert not (place.folder / "mine" / "replay.jsonl").exists()
    with (place.folder / "mine" / "replay.partial.jsonl").open("ab") as file:
        file.write('{"key": "Zür'.encode()[:-1])  # torn within a character

    place.base.fails_after = None
    place.replay()

    assert place.base.questions == ALL[num_finished:]
    for name in ("replay.jsonl", "replay.partial.jsonl"):
        whole, mine = ((place.folder / run / name).read_bytes() for run in ("whole", "mine"))
        assert whole == mine


def test_a_change_asks_anew_what_it_concerns(place: Workplace) -> None:
    place.replay()
    before = place.read()

    place.ask_for("New?", *reversed(ALL))
    place.replay()
    assert place.base.questions == ["New?"]
    assert place.read()[1:] == before[::-1]

    for change in ({"seed": 2}, {"max_tokens": 65}, {"gguf": "bf16"}):
        place.replay(**change)
        assert place.base.questions == ["New?", *reversed(ALL)], change
    place.sha256 = "1" * 64
    place.replay()
    assert len(place.base.asked) == 6
    place.sha256 = "0" * 64
    place.replay()
    assert place.base.asked == []


def test_another_kind_is_written_without_asking(place: Workplace) -> None:
    place.replay()
    write_prompts(place.prompts, *(user(q, kind="other") for q in ALL))

    assert place.replay()[1]
    assert {row["kind"] for row in place.read()} == {"other"}
    assert place.base.asked == []


def test_what_is_not_kept_is_counted_and_not_asked_again(place: Workplace) -> None:
    def say(question: str, sampling: Sampling) -> str:
        return "no thought" if question in ALL[:2] else own_words(question, sampling)

    place.base.say = say
    tally, _ = place.replay()

    assert str(tally) == f"kept 3 of 5, rejected 2 malformed; {tally.num_tokens} tokens"
    assert tally.facts() == {
        "prompts": 5,
        "kept": 3,
        "rejected": {"malformed": 2},
        "tokens": tally.num_tokens,
    }
    assert [row["messages"][0]["content"] for row in place.read()] == ALL[2:]
    assert place.replay() == (tally, False)
    assert place.base.asked == []


def test_a_base_that_does_not_think_is_told(place: Workplace) -> None:
    place.base.say = lambda *_: "no thought"
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            place.replay()
        assert str(caught.value) == (
            f"{place.prompts}: none of the base's 5 replies can be kept (5 malformed); "
            "replay needs a base that answers in Qwen3's thinking form, within replay.max_tokens"
        )
    assert place.num_written == 1
    assert not (place.folder / "mine" / "replay.jsonl").exists()


def test_the_whole_file_is_checked_before_the_base_is_written(place: Workplace) -> None:
    write_prompts(place.prompts, user("Fine?"), {})
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: a prompt must be a JSON object"):
        place.replay()
    assert place.num_written == 0
    assert not (place.folder / "mine").exists()


def test_a_prompt_that_does_not_fit_is_named_before_any_is_asked(place: Workplace) -> None:
    place.ask_for("Short?", "Long" * 300)
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: the prompt has \d+ tokens, the base"):
        place.replay()
    assert place.base.asked == []


def test_a_journal_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "replay.partial.jsonl"
    path.mkdir()
    reply = Reply("key", GOOD, 3, None)
    for act in (Journal(path).read, Journal(path).repair, lambda: Journal(path).append(reply)):
        with pytest.raises(
            RunError, match=r"replay\.partial\.jsonl cannot be (read|written): Is a"
        ):
            act()


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for is_terminal in (True, False):
        out = io.StringIO()
        tally = Tally(3, num_new_tokens=1)
        with show_progress(tally, Console(file=out, force_terminal=is_terminal), 0) as show:
            tally.count(Reply("a", GOOD, 3, None))
            tally.count(Reply("b", "", 2, "malformed"))
            show()
        lines = [record.getMessage() for record in caplog.records]
        if is_terminal:
            assert "2/3" in out.getvalue()
            assert "kept 1, rejected 1" in out.getvalue()
            assert lines == []
        else:
            assert out.getvalue() == ""
            assert len(lines) == 1
            assert lines[0].startswith("replay: 2 of 3, kept 1, rejected 1, ")


def test_lines_come_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with show_progress(Tally(3), Console(file=io.StringIO()), 3600) as show:
        for _ in range(100):
            show()
    assert caplog.records == []


def test_a_repeatable_reply_does_not_depend_on_what_was_asked_before(
    tiny_gguf: Path, chat: Chat, tmp_path: Path
) -> None:
    shared = "A system prompt that all of them begin with. " * 5
    prompts = [
        chat.prompt_ids(
            [{"role": "system", "content": shared}, {"role": "user", "content": question}],
            None,
            "thinking",
        )
        for question in ("Why?", "Who are you?", "Why not today, and how about tomorrow?")
    ]

    async def ask(order: Sequence[int]) -> dict[int, tuple[str, int]]:
        said = {}
        async with await LlamaCpp.start(
            tiny_gguf, slots=1, context_tokens=600, log=tmp_path / "log"
        ) as engine:
            for index in order:
                sampling = Sampling(max_tokens=40, seed=index, is_repeatable=True)
                deltas = [d async for d in engine.generate(prompts[index], sampling)]
                cached = max(delta.num_cached_tokens for delta in deltas)
                said[index] = "".join(delta.text for delta in deltas), cached
        return said

    forwards, backwards = (asyncio.run(ask(order)) for order in ((0, 1, 2), (2, 1, 0)))
    assert forwards == backwards
    assert {cached for _, cached in forwards.values()} == {0}
    assert all(text for text, _ in forwards.values())


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    return run


RECIPE = """
base: {base}
data: {{sources: [{{path: chats.jsonl}}, {{path: runs/mine/replay.jsonl, share: 0.2}}]}}
replay: {{prompts: prompts.jsonl, max_tokens: 8, gguf: bf16}}
"""


def test_the_base_is_written_once_and_its_fault_told(
    tiny_base: Path,
    tiny_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_command: Command,
) -> None:
    written: list[Path] = []

    def export(checkpoint: Path, out: Path, name: str, formats: Sequence[str]) -> None:
        assert (checkpoint, name, formats) == (tiny_base, "base", ["bf16"])
        out.mkdir()
        shutil.copyfile(tiny_gguf, out / "base-bf16.gguf")
        written.append(out)

    monkeypatch.setattr("pipeline.export.export_gguf", export)
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "prompts.jsonl", user("Why?"), user("Who?"))
    (tmp_path / "mine.yaml").write_text(RECIPE.format(base=tiny_base))
    journal = Run(Path("runs/mine")).replay_journal

    replies = []
    for _ in range(2):
        code, _, err = run_command("replay", "mine.yaml")
        assert code == 2
        assert "error: prompts.jsonl: none of the base's 2 replies can be kept (2 unfin" in err
        replies.append(journal.read_bytes())
        journal.unlink()

    assert replies[0] == replies[1]
    assert written == [Path("runs/mine/replay-base")]


def test_the_command_says_what_to_add_to_the_recipe(
    place: Workplace, chat_folder: Path, monkeypatch: pytest.MonkeyPatch, run_command: Command
) -> None:
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr(preparing, "_base_gguf", lambda _: Path("base.gguf"))
    shutil.copytree(chat_folder, "base")
    Path("base/config.json").write_text("{}")
    Path("mine.yaml").write_text(RECIPE.format(base="base"))
    source = "a source for data.sources: {path: runs/mine/replay.jsonl, share: 0.2}\n"

    code, out, _ = run_command("replay", "mine.yaml")
    assert (code, out) == (0, f"replay: kept 5 of 5; 20 tokens\n{source}")
    assert Run(Path("runs/mine")).facts()["replay"]["kept"] == 5

    code, out, _ = run_command("replay", "mine.yaml")
    nothing = "replay: nothing to do, runs/mine/replay.jsonl was made from the same inputs\n"
    assert (code, out) == (0, f"{nothing}replay: kept 5 of 5; 20 tokens\n{source}")

    place.base.fails_after, place.base.error = 7, KeyboardInterrupt()
    code, _, _ = run_command("replay", "mine.yaml", "--set", "train.seed=7")
    assert code == 130
    assert len(place.base.asked) == 7
