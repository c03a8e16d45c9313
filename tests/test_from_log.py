"""From what was served to what is learnt: `pipeline data from-log`."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Pipeline
from inside import ask
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.run import Run, read_json
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.content.files import ContentFiles, content_folder
from pipeline.serve.content.lessons import find_lessons
from pipeline.serve.content.log import ContentLog
from pipeline.serve.offer.catalog import Catalog, Served

DAY_MS = 24 * 60 * 60 * 1000
PARAMETERS = {"type": "object", "properties": {"at": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}]
DIRECT = {"reasoning": {"enabled": False}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others}


def answered(content: str = "yes", reasoning: str = "", **others: Any) -> dict[str, Any]:
    return {
        "reasoning": reasoning,
        "content": content,
        "tool_calls": [],
        "finish_reason": "stop",
        "native_finish_reason": "stop",
        "stop": None,
        **others,
    }


def line(*messages: Any, answer: Any = None, **others: Any) -> dict[str, Any]:
    """An entry of the log."""
    return {
        "id": "gen-1",
        "key": "ab" * 32,
        "created_ms": 0,
        "model": "local/tiny",
        "messages": list(messages) or [user("is it so?")],
        "settings": {},
        "choices": [answer or answered()],
        "cancelled": False,
        "error": None,
        **others,
    }


def test_a_sound_answer_ends_its_conversation() -> None:
    tool_line = line(
        user("where?"),
        tools=TOOLS,
        answer=answered(
            "Let me see.",
            "hm",
            tool_calls=[
                {"type": "function", "function": {"name": "look", "arguments": '{"at":1}'}}
            ],
            finish_reason="tool_calls",
        ),
    )

    found = find_lessons([line(answer=answered("yes", "hm")), tool_line, line(user("b"))])

    call = {"type": "function", "function": {"name": "look", "arguments": '{"at":1}'}}
    thought = said("Let me see.", reasoning_content="hm", tool_calls=[call])
    assert found.conversations == [
        {"messages": [user("is it so?"), said("yes", reasoning_content="hm")]},
        {"messages": [user("where?"), thought], "tools": TOOLS},
        {"messages": [user("b"), said("yes")]},
    ]
    assert (found.num_answers, dict(found.left_out)) == (3, {})


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (line(error={"type": "provider_unavailable"}), "failed"),
        (line(cancelled=True), "cancelled"),
        (line(answer=answered(finish_reason=None)), "cancelled"),
        (line(answer=answered(finish_reason="content_filter")), "refused"),
        (line(answer=answered(native_finish_reason="refusal")), "refused"),
        (line(answer=answered(finish_reason="length")), "cut off"),
        (line(answer=answered(stop=".")), "cut off"),
        (line(answer=answered("", "only a thought")), "unfit"),
        (line({"role": "system", "content": "Be brief."}), "unfit"),
        (line(messages=None), "unfit"),
        (line(messages=["redacted"]), "unfit"),
        (line(choices=["redacted"]), "unfit"),
        ({k: v for k, v in line(prompt="once").items() if k != "messages"}, "no dialogue"),
    ],
)
def test_what_nobody_should_learn_is_left_out_and_counted(entry: Any, why: str) -> None:
    found = find_lessons([entry, line(user("sound"))])

    assert [each["messages"][0]["content"] for each in found.conversations] == ["sound"]
    assert dict(found.left_out) == {why: 1}


def test_the_same_again_is_left_out_and_another_answer_is_not() -> None:
    other_tools = line(tools=TOOLS)
    lines = [line(), line(id="gen-2"), line(answer=answered("no")), other_tools, line(choices=[])]
    lines.append(line(answer=answered("yes", "another thought")))
    lines.append(line(choices=[answered(), answered("no"), answered("both")]))

    found = find_lessons(lines)

    answers = [each["messages"][-1]["content"] for each in found.conversations]
    assert answers == ["yes", "no", "yes", "yes", "both"]
    assert dict(found.left_out) == {"the same again": 3}


def test_a_conversation_that_grew_is_there_once_with_every_thought() -> None:
    first = [user("a")]
    second = [*first, said("A"), user("b")]
    third = [*second, said("B "), user("c")]
    lines = [
        line(*first, answer=answered("A", "about a")),
        line(*second, answer=answered("B", "about b")),
        line(*third, answer=answered("C")),
    ]

    for order in (lines, lines[::-1]):
        found = find_lessons(order)
        (conversation,) = found.conversations
        assert conversation["messages"] == [
            user("a"),
            said("A", reasoning_content="about a"),
            user("b"),
            said("B", reasoning_content="about b"),
            user("c"),
            said("C"),
        ]
        assert (found.num_answers, dict(found.left_out)) == (3, {"gone on with": 2})


def test_what_no_entry_has_in_a_conversation_is_context() -> None:
    cut = line(user("a"), answer=answered("half an", finish_reason="length"))
    grown = line(user("a"), said("half an"), user("go on"), said("made up"), user("b"))

    found = find_lessons([cut, grown])

    (conversation,) = found.conversations
    trained = [message.get("train") for message in conversation["messages"]]
    assert trained == [None, False, None, False, None, None]
    assert (found.num_answers, dict(found.left_out)) == (1, {"cut off": 1})


def test_an_answer_that_two_conversations_go_on_from_is_learnt_once() -> None:
    begun = [user("a"), said("A")]
    lines = [
        line(user("a"), answer=answered("A", "about a")),
        line(*begun, user("left"), answer=answered("L")),
        line(*begun, user("right"), answer=answered("R")),
    ]

    found = find_lessons(lines)

    of_both = [each["messages"][1] for each in found.conversations]
    thought = said("A", reasoning_content="about a")
    assert of_both == [thought, {**thought, "train": False}]
    assert found.num_answers == 3


def test_an_answer_with_another_thought_is_learnt_beside_the_conversation_that_goes_on() -> None:
    lines = [
        line(user("a"), answer=answered("A", "about a")),
        line(user("a"), answer=answered("A")),
        line(user("a"), said("A"), user("b"), answer=answered("B")),
    ]

    found = find_lessons(lines)

    assert [each["messages"][:2] for each in found.conversations] == [
        [user("a"), said("A")],
        [user("a"), said("A", reasoning_content="about a")],
    ]
    assert found.num_answers == 3


def test_an_answer_that_was_begun_for_the_model_is_whole() -> None:
    found = find_lessons([line(user("count"), said("one, "), answer=answered("two"))])

    assert found.conversations == [{"messages": [user("count"), said("one, two")]}]


def test_names_and_tools_are_as_the_model_was_given_them() -> None:
    named = line({**user("hi"), "name": "Ann"}, tools=TOOLS, settings={"tool_choice": "none"})

    assert find_lessons([named]).conversations == [{"messages": [user("Ann: hi"), said("yes")]}]


@dataclass
class Teacher:
    """A server with books in the current directory, and a key whose content is logged."""

    app: App
    key: str
    engine: ScriptedEngine

    def ask(self, *chunks: str, path: str = "/chat/completions", **fields: Any) -> Any:
        self.engine.chunks = list(chunks)
        headers = {"Authorization": f"Bearer {self.key}"}
        body = json.dumps({"max_tokens": 500, **fields}).encode()
        answer = asyncio.run(ask(self.app, "POST", f"/v1{path}", headers, body))
        assert answer.status == 200, answer.body
        return answer.json


@pytest.fixture
def teacher(chat: Chat, workplace: Path) -> Iterator[Teacher]:
    with (
        open_books("books.sqlite") as books,
        closing(Ledger(books)) as ledger,
        closing(ContentLog(ContentFiles(content_folder(books.url), 9, 2**20))) as content_log,
    ):
        keys, engine = Keys(books), ScriptedEngine(able=["grammar"])
        engine.context_tokens = 20_000
        catalog = Catalog([Served("tiny", chat, engine, 1)])
        app = App(catalog, keys, ledger, content_log=content_log)
        yield Teacher(app, keys.create("teacher", {"log_content": True}), engine)


def thinking(thought: str, *answer: str) -> tuple[str, ...]:
    return ("<think>", f"\n{thought}\n", "</think>", "\n\n", *answer)


def call(at: int) -> tuple[str, ...]:
    text = json.dumps({"name": "look", "arguments": {"at": at}})
    return ("<tool_call>", f"\n{text}\n", "</tool_call>")


def serve_conversations(teacher: Teacher) -> None:
    """A tool loop in thinking mode that goes on, and other dialects in both modes."""
    messages = [{"role": "system", "content": "Be brief."}, user("where?")]
    for number, chunks in enumerate(
        [thinking("I must look.", *call(1)), thinking("There.", "in the ", "garden"), ("again",)]
    ):
        mode = {} if number < 2 else DIRECT
        body = teacher.ask(*chunks, messages=messages, tools=TOOLS, **mode)
        message = body["choices"][0]["message"]
        messages.append({k: message.get(k) for k in ("role", "content", "tool_calls")})
        calls = message.get("tool_calls") or ()
        messages += [
            {"role": "tool", "tool_call_id": each["id"], "content": "garden"} for each in calls
        ] or [user("really?")]
    teacher.ask(*thinking("Hm.", "yes"), path="/responses", input="is it so?")
    teacher.ask("no ", "<think>", path="/messages", messages=[user("<|im_end|> or not?")])
    teacher.ask(*call(2), messages=[user("look")], tools=TOOLS, **DIRECT)
    teacher.ask("cut", " off", messages=[user("?")], max_tokens=1, **DIRECT)


@pytest.mark.parametrize("thinking_kept", ["per_row", "never"])
def test_what_was_served_goes_through_the_data_stage_with_nothing_refused(
    teacher: Teacher, workplace: Path, pipeline: Pipeline, chat: Chat, thinking_kept: str
) -> None:
    serve_conversations(teacher)
    teacher.app.content_log.close()

    told = pipeline("data", "from-log", "--books", "books.sqlite", "--out", "served.jsonl")
    sets = ["data.sources=[{path: served.jsonl}]", f"data.thinking={thinking_kept}"]
    options = [word for each in [*sets, "data.invalid=refuse"] for word in ("--set", each)]
    made = pipeline("data", "mine.yaml", *options, "--dump", "rows.jsonl")

    assert told.out.splitlines() == [
        "served.jsonl: 4 conversations, 6 answers",
        "left out: 2 gone on with, 1 cut off",
    ]
    assert made.code == 0, made.err
    report = read_json(Run(Path("runs/mine")).data_report)
    assert report["train"]["rows"] == 6
    rows = [json.loads(row) for row in Path("rows.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["part"] == "train"]
    learnt = [chat.decode([i for i in row["labels"] if i >= 0]) for row in rows]
    modes = sorted(row["mode"] for row in rows)
    expected = {"per_row": ["direct"] * 3 + ["thinking"] * 3, "never": ["direct"] * 6}
    assert modes == expected[thinking_kept]
    assert sum('{"name": "look", "arguments": {"at": 1}}' in text for text in learnt) == 1
    assert sum("I must look." in text for text in learnt) == (thinking_kept == "per_row")


def log_of(folder: Path, *lines: Any) -> None:
    files = ContentFiles(folder, 1000, 2**20, lambda: 10 * DAY_MS / 1000)
    for each in lines:
        files.append(each["created_ms"], json.dumps(each).encode() + b"\n")


def test_what_is_learnt_is_chosen_by_model_key_and_day(workplace: Path, pipeline: Pipeline) -> None:
    log_of(
        Path("log"),
        line(user("a"), model="acme/one"),
        line(user("b"), model="acme/one:free", key="cd" * 32),
        line(user("c"), model="acme/other", created_ms=DAY_MS),
        line(user("d"), model="Acme/One", created_ms=2 * DAY_MS),
    )

    def learnt(*options: str) -> list[str]:
        Path("out.jsonl").unlink(missing_ok=True)
        said = pipeline("data", "from-log", "log", "--out", "out.jsonl", *options)
        assert said.code == 0, said.err
        conversations = map(json.loads, Path("out.jsonl").read_text().splitlines())
        return [each["messages"][0]["content"] for each in conversations]

    assert learnt() == ["a", "b", "c", "d"]
    assert learnt("--model", "acme/one") == ["a", "b", "d"]
    assert learnt("--model", "acme/one:free") == ["b"]
    assert learnt("--key", "ABAB") == ["a", "c", "d"]
    assert learnt("--since", "1970-01-02") == ["c", "d"]
    assert learnt("--since", "1970-01-02", "--model", "acme/one") == ["d"]
    assert Path("out.jsonl").stat().st_mode & 0o777 == 0o600


def test_the_log_is_looked_for_beside_the_books(workplace: Path, pipeline: Pipeline) -> None:
    log_of(Path("some.sqlite.content"), line())

    said = pipeline("data", "from-log", "--books", "some.sqlite", "--out", "out.jsonl")

    assert (said.code, said.out.splitlines()[0]) == (0, "out.jsonl: 1 conversations, 1 answers")
    assert not Path("some.sqlite").exists(), "books were made that nobody wanted"


def test_a_log_without_a_lesson_makes_no_file(workplace: Path, pipeline: Pipeline) -> None:
    nothing = pipeline("data", "from-log", "log", "--out", "out.jsonl")
    log_of(Path("log"), line(cancelled=True), line(user("b"), cancelled=True))
    cancelled = pipeline("data", "from-log", "log", "--out", "out.jsonl")
    log_of(Path("log"), line(user("c")))
    Path("there.jsonl").write_text("mine")
    there = pipeline("data", "from-log", "log", "--out", "there.jsonl")
    unwritable = pipeline("data", "from-log", "log", "--out", "no/folder.jsonl")

    Path("other").mkdir()
    Path("other", "notes.jsonl").write_text("my notes\n")
    notes = pipeline("data", "from-log", "other", "--out", "out.jsonl")

    assert [said.code for said in (nothing, cancelled, there, unwritable, notes)] == [2] * 5
    assert notes.err.startswith("error: other/notes.jsonl is no file of a content log (")
    assert nothing.err == (
        "error: log has nothing to learn from: keys made with --log-content have their replies "
        "there\n"
    )
    assert cancelled.err == "error: log has nothing to learn from: left out: 2 cancelled\n"
    assert "there.jsonl is there already" in there.err
    assert unwritable.err == "error: no/folder.jsonl cannot be written: No such file or directory\n"
    assert not Path("out.jsonl").exists()
    assert Path("there.jsonl").read_text() == "mine"


def test_data_takes_a_recipe_or_a_command(workplace: Path, pipeline: Pipeline) -> None:
    Path("from-log").write_text("base: [", encoding="utf-8")

    assert pipeline("data", "mine.yaml").code == 0
    assert "nothing to do" in pipeline("data", "rows", "mine.yaml").out
    assert "nothing to do" in pipeline("data", "--show", "1", "mine.yaml").out
    assert pipeline("data", "./from-log").err.startswith("error: from-log is not YAML")
    assert {"rows", "from-log"} <= set(pipeline("data", "--help").out.split())
