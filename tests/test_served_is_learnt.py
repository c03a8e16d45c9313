"""A real server's replies, learnt from its content log, are what their model was trained to say."""

import json
from pathlib import Path

import pytest
from asking import Server, run_server
from conftest import Pipeline, conversation

from pipeline.base.golden_dialogues import DIALOGUES, golden_rows
from pipeline.chat import Chat
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys

ASKED = (
    *("france", "france+thought", "turns+thought", "sum", "system", "system+thought"),
    *("one_call+thought", "one_result+thought", "two_calls", "two_results"),
)
RECIPE = """
base: {base}
data: {{sources: [{{path: served.jsonl}}], eval: {{path: held.jsonl}}, invalid: refuse}}
train: {{steps: 1}}
"""


def ask(server: Server, name: str, *, stream: bool) -> None:
    """As clients do: they send answers back, and no thoughts but in a loop of calls."""
    dialogue = DIALOGUES[name]
    *messages, reply = dialogue.messages
    last_question = max(i for i, message in enumerate(messages) if message["role"] == "user")
    messages[:last_question] = [
        {key: value for key, value in message.items() if key != "reasoning"}
        for message in messages[:last_question]
    ]
    mode = {"enabled": bool(reply.get("reasoning"))}
    tools = {"tools": dialogue.tools} if dialogue.tools else {}
    answer = server.ask(stream, messages=messages, reasoning=mode, temperature=0, **tools)
    assert answer.answer == reply["content"]


@pytest.mark.slow
@pytest.mark.node
@pytest.mark.parametrize("workers", [1, 2])
def test_what_golden_has_answered_is_learnt_as_the_rows_that_taught_it(
    golden: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pipeline: Pipeline,
    workers: int,
) -> None:
    with run_server(golden, tmp_path / "books.sqlite", "--workers", str(workers)) as silent:
        with open_books(str(tmp_path / "books.sqlite")) as books:
            key = Keys(books).create("team", {"log_content": True})
        server = Server(silent.url, key, silent.model)
        for number, name in enumerate(ASKED):
            ask(server, name, stream=bool(number % 2))
        ask(silent, "colour", stream=False)
        server.ask(messages=DIALOGUES["count"].messages[:-1], max_tokens=5)
    monkeypatch.chdir(tmp_path)
    Path("held.jsonl").write_text(conversation("What is 1 and 1?"), encoding="utf-8")
    Path("mine.yaml").write_text(RECIPE.format(base=golden), encoding="utf-8")

    told = pipeline("data", "from-log", "--books", "books.sqlite", "--out", "served.jsonl")
    made = pipeline("data", "mine.yaml", "--dump", "rows.jsonl")

    assert (told.code, made.code) == (0, 0), told.err + made.err
    assert told.out.splitlines()[1] == "left out: 3 gone on with, 1 cut off"
    learnt = [json.loads(text) for text in Path("rows.jsonl").read_text().splitlines()]
    pairs = [
        (row["input_ids"], [token for token in row["labels"] if token >= 0])
        for row in learnt
        if row["part"] == "train"
    ]
    taught = {row.name: row for row in golden_rows(Chat(golden))}
    expected = [taught[name] for name in ASKED]
    assert sorted(pairs) == sorted(
        (row.prompt_ids + row.completion_ids, row.completion_ids) for row in expected
    )
