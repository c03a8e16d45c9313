"""The benchmark of the data stage: what it measures with, and that it measures it rightly."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

from pipeline.base.qwen3 import qwen3_dialogue
from pipeline.bench import data as bench
from pipeline.bench.conversations import make_conversations, write_conversations
from pipeline.bench.data import Result, Timing, bench_data, table
from pipeline.bench.measure import Measured, measure
from pipeline.chat import Chat
from pipeline.data.store import read_rows
from pipeline.errors import PipelineError


def texts(first: int, num: int) -> list[str]:
    return [json.dumps(conversation) for conversation in make_conversations(first, num)]


def test_conversations_are_the_same_every_time_and_all_different(tmp_path: Path) -> None:
    made = texts(0, 3000)

    assert len(set(made)) == 3000
    assert texts(1000, 10) == made[1000:1010]
    write_conversations(tmp_path / "some.jsonl", 5, 3)
    written = (tmp_path / "some.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in written] == [json.loads(text) for text in made[5:8]]


def test_conversations_do_not_differ_by_their_number_alone() -> None:
    answers = [c["messages"][1]["content"] for c in make_conversations(0, 3000)]

    assert len({answer[:40] for answer in answers}) > 2900


def test_a_conversation_is_one_question_and_one_answer() -> None:
    for conversation in make_conversations(0, 100):
        assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"]


def test_conversations_are_of_about_200_words_and_marks_and_vary() -> None:
    sizes = [
        sum(len(re.findall(r"\w+|[^\w\s]", m["content"])) for m in conversation["messages"])
        for conversation in make_conversations(0, 1000)
    ]

    assert 150 < statistics.mean(sizes) < 200  # some words are more than one token
    assert max(sizes) > 2 * min(sizes)


@pytest.mark.node
def test_conversations_are_of_about_200_of_qwen3s_tokens() -> None:
    chat = Chat(qwen3_dialogue())
    sizes = [
        len(turn.prompt_ids) + len(turn.completion_ids)
        for conversation in make_conversations(0, 1000)
        for turn in chat.turns(conversation["messages"], None)
    ]

    assert len(sizes) == 1000
    assert 190 < statistics.mean(sizes) < 210


HOLD = "import os, time; held = b'x' * (100 << 20); "
WAIT = "time.sleep(0.8); pid and os.wait()"


@pytest.mark.parametrize(
    ("code", "mib"),
    [
        (HOLD + "time.sleep(0.8)", 100),
        (HOLD + "time.sleep(0.5); del held; time.sleep(0.3)", 100),
        (HOLD + "pid = os.fork(); " + WAIT, 100),
        (HOLD + "pid = os.fork(); own = pid or b'y' * (100 << 20); " + WAIT, 200),
    ],
    ids=["held", "held for a while", "shared with a child", "held by a child too"],
)
def test_peak_memory_is_that_of_all_processes_with_shared_pages_once(
    tmp_path: Path, code: str, mib: int
) -> None:
    found = measure([sys.executable, "-I", "-c", code], tmp_path, {})

    assert mib < found.peak_mib < mib + 30


def test_a_commands_time_output_folder_and_environment_are_its_own(tmp_path: Path) -> None:
    code = "import os, sys, time; time.sleep(0.3); print(os.getcwd(), os.environ['WORD'])"

    found = measure([sys.executable, "-c", code], tmp_path, {"WORD": "hello"})

    assert found.output == f"{tmp_path} hello\n"
    assert found.seconds >= 0.3


def test_a_command_that_fails_is_one_sentence_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"^`-c .*` failed: ValueError: on purpose$"):
        measure([sys.executable, "-c", "raise ValueError('on purpose')"], tmp_path, {})
    with pytest.raises(PipelineError, match=r"^`-c exit\(3\)` failed: exit code 3$"):
        measure([sys.executable, "-c", "exit(3)"], tmp_path, {})


def test_the_table_says_what_was_measured_and_how_trl_compares() -> None:
    result = Result(
        ours=Timing("ours", 1000, 2.0, 2.0, 400.0),
        again=Timing("again", 1000, 0.5, 0.5, 100.0),
        trl=(Timing("theirs", 1000, 5.0, 9.0, 600.0), Timing("theirs, 2", 1000, 3.0, 7.0, 1000.0)),
        machine="a processor, 2 cores",
        versions={"python": "3.11.0", "trl": "1.16.0"},
    )

    lines = table(result).splitlines()

    assert lines[2:6] == [
        "| ours | 1000 | 2.0 | 2000 | 2.0 | 400 |",
        "| again | 1000 | 0.5 | 500 | 0.5 | 100 |",
        "| theirs | 1000 | 5.0 | 5000 | 9.0 | 600 |",
        "| theirs, 2 | 1000 | 3.0 | 3000 | 7.0 | 1000 |",
    ]
    assert lines[7:] == [
        "theirs: 2.50 times our seconds a row, 1.50 times our memory.",
        "theirs, 2: 1.50 times our seconds a row, 2.50 times our memory.",
        "Measured on a processor, 2 cores; python 3.11.0, trl 1.16.0.",
    ]


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prepared").touch()

    with pytest.raises(PipelineError, match="is not empty: a benchmark begins with nothing"):
        bench_data(1, tmp_path)


def test_rows_that_are_missing_are_told() -> None:
    with pytest.raises(PipelineError, match=r"^theirs: 3 conversations became 2 rows$"):
        bench._timing("theirs", 2, 3, Measured(1.0, 1.0, ""), 1.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_trains_the_same_tokens_and_a_line_break_more(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from pipeline.bench.trl_data import prepare

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_conversations(tmp_path / "chats.jsonl", 0, 20)

    prepared = prepare(tmp_path / "chats.jsonl", chat_folder, None)

    chat = Chat(chat_folder)
    turns = [turn for c in make_conversations(0, 20) for turn in chat.turns(c["messages"], None)]
    assert prepared.rows["input_ids"][:] == [
        [*turn.prompt_ids, *turn.completion_ids, *chat.encode("\n")] for turn in turns
    ]
    assert prepared.rows["labels"][:] == [
        [*[-100] * len(turn.prompt_ids), *turn.completion_ids, *chat.encode("\n")] for turn in turns
    ]
    assert prepared.prepare_seconds > 0


@pytest.mark.slow
def test_the_whole_benchmark_measures_every_row_of_both(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "qwen3_dialogue", lambda: chat_folder)
    folder = tmp_path / "bench"

    result = bench_data(20, folder)

    lines = (result.ours, result.again, *result.trl)
    assert [line.rows for line in lines] == [20] * 4
    assert all(line.peak_mib > 20 for line in lines)
    assert all(line.process_seconds > line.seconds for line in result.trl)
    assert result.ours.seconds == result.ours.process_seconds
    written = json.loads((folder / bench.RESULT).read_text())
    assert written["ours"]["seconds"] == result.ours.seconds
    assert len(list(read_rows(folder / "runs" / "bench-data" / "data" / "train.arrow"))) == 20
    assert "| `pipeline data`, the whole command | 20 |" in table(result)
