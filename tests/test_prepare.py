"""The data stage: what lies on disk is what the report says, or nothing does."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from row_files import write_rows

from pipeline.data import inputs
from pipeline.data.mix import draw
from pipeline.data.prepare import prepare
from pipeline.data.store import read_rows
from pipeline.errors import DataError, RunError
from pipeline.recipe import Data
from pipeline.run import read_json
from pipeline.tree import count_tree_tokens

USER = {"role": "user", "content": "How much is 1+1?"}
DIRECT = {"role": "assistant", "content": "2"}
THOUGHT = {"role": "assistant", "content": "2", "reasoning": "One and one."}
FINE = json.dumps({"messages": [USER, DIRECT]})


def row(*messages: Any, **more: Any) -> str:
    return json.dumps({"messages": messages, **more})


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def settings(*sources: Path, **more: Any) -> Data:
    return Data(sources=[{"path": str(source)} for source in sources], **more)


def numbered(path: Path, size: int, start: int = 0) -> Path:
    """A file of conversations that differ."""
    return write(
        path,
        *(
            row({"role": "user", "content": f"Say {i}."}, DIRECT if i % 2 else THOUGHT)
            for i in range(start, start + size)
        ),
    )


def keyed(path: Path) -> set[str]:
    """The rows of a file by their ids alone."""
    return {f"{row.prompt_ids}{row.completion_ids}" for row in read_rows(path)}


def test_the_report_adds_up_to_the_rows_on_disk(chat_folder: Path, tmp_path: Path) -> None:
    source = numbered(tmp_path / "chats.jsonl", 60)
    out = tmp_path / "data"

    report = prepare(settings(source, eval={"share": 0.3}), chat_folder, 42, out)

    assert read_json(out / "report.json") == report
    assert report["noted"] == {}
    for part in ("train", "eval"):
        rows = list(read_rows(out / f"{part}.arrow"))
        sizes = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
        assert report[part] == {
            "conversations": len(rows),
            "rows": len(rows),
            "thinking_rows": sum(row.mode == "thinking" for row in rows),
            "direct_rows": sum(row.mode == "direct" for row in rows),
            "prompt_tokens": sum(len(row.prompt_ids) for row in rows),
            "supervised_tokens": sum(len(row.completion_ids) for row in rows),
            "longest_row": max(sizes),
        }
        assert report[f"{part}_sha256"] == write_rows(tmp_path / "again.arrow", rows)
    assert report["train"]["rows"] + report["eval"]["rows"] == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.arrow",
        "chats.jsonl",
        "data",
    ]


def test_a_share_is_held_out_by_content_wherever_it_stands(
    chat_folder: Path, tmp_path: Path
) -> None:
    whole = numbered(tmp_path / "whole.jsonl", 40)
    lines = whole.read_text("utf-8").splitlines()
    first = write(tmp_path / "first.jsonl", *reversed(lines[:25]))
    second = write(tmp_path / "second.jsonl", *lines[20:])
    held = {"share": 0.4}

    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    prepare(settings(whole, eval=held), chat_folder, 42, one)
    prepare(settings(first, second, eval=held), chat_folder, 42, two)
    prepare(settings(whole, eval=held), chat_folder, 43, other)

    train, kept = keyed(one / "train.arrow"), keyed(one / "eval.arrow")
    assert len(train) + len(kept) == 40
    assert train.isdisjoint(kept)
    assert (keyed(two / "train.arrow"), keyed(two / "eval.arrow")) == (train, kept)
    assert keyed(other / "eval.arrow") != kept


def test_preparing_twice_gives_the_same_bytes(chat_folder: Path, tmp_path: Path) -> None:
    data = settings(numbered(tmp_path / "chats.jsonl", 20), eval={"share": 0.4})

    reports = [prepare(data, chat_folder, 42, tmp_path / name) for name in ("one", "two")]

    assert reports[0] == reports[1]
    for name in ("train.arrow", "eval.arrow", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_held_out_rows_may_come_from_a_file_of_their_own(chat_folder: Path, tmp_path: Path) -> None:
    source = numbered(tmp_path / "chats.jsonl", 6)
    held = numbered(tmp_path / "held.jsonl", 4, start=100)
    out = tmp_path / "data"

    report = prepare(settings(source, eval={"path": str(held)}), chat_folder, 42, out)

    assert (report["train"]["rows"], report["eval"]["rows"]) == (6, 4)
    assert {row.source for row in read_rows(out / "eval.arrow")} == {
        f"{held}:{line}" for line in range(1, 5)
    }


def test_a_cap_takes_conversations_from_the_top(chat_folder: Path, tmp_path: Path) -> None:
    source = numbered(tmp_path / "chats.jsonl", 9)
    held = numbered(tmp_path / "held.jsonl", 1, start=100)
    data = Data(sources=[{"path": str(source), "cap": 2}], eval={"path": str(held)})

    prepare(data, chat_folder, 42, tmp_path / "data")

    sources = [row.source for row in read_rows(tmp_path / "data" / "train.arrow")]
    assert sources == [f"{source}:1", f"{source}:2"]


def test_invalid_conversations_are_dropped_and_counted_where_the_recipe_says_so(
    chat_folder: Path, tmp_path: Path
) -> None:
    source = numbered(tmp_path / "chats.jsonl", 20)
    system_only = row({"role": "system", "content": "x"}, DIRECT)
    source.write_text(f"{system_only}\nbroken\n{source.read_text('utf-8')}{row(USER)}\n")
    data = settings(source, eval={"share": 0.3}, invalid="drop")

    report = prepare(data, chat_folder, 42, tmp_path / "data")

    assert report["train"]["rows"] + report["eval"]["rows"] == 20
    assert report["noted"] == {"invalid": 3}
    assert [sentence.partition(": ")[0] for sentence in report["examples"]["invalid"]] == [
        f"{source}:{line}" for line in (1, 2, 23)
    ]
    assert "conversations dropped as invalid: 3" in report["warnings"]


@pytest.mark.parametrize(
    ("lines", "more", "said"),
    [
        ([FINE, "broken"], {}, "{source}:2: not JSON"),
        ([FINE, row({"role": "system", "content": "x"}, DIRECT)], {}, "{source}:2: no assistant"),
        (
            [FINE],
            {"max_tokens": 2},
            "no row is left to train on: {source}:1: message 1: the row has",
        ),
        ([FINE], {"thinking": "always"}, "no row is left to train on"),
        (["broken"], {"invalid": "drop"}, "no row is left to train on"),
        ([FINE], {"eval": {"share": 1e-9}}, "no row is held out; name data.eval.path"),
        ([FINE], {"eval": {"path": "none.jsonl"}}, "none.jsonl is missing"),
    ],
)
def test_a_refusal_leaves_nothing_and_keeps_what_was_there(
    chat_folder: Path, tmp_path: Path, lines: list[str], more: dict[str, Any], said: str
) -> None:
    source = write(tmp_path / "chats.jsonl", *lines)
    out, older = tmp_path / "data", tmp_path / "older"
    older.mkdir()
    (older / "report.json").write_text("older")

    for folder in (out, older):
        with pytest.raises(DataError) as caught:
            prepare(settings(source, **more), chat_folder, 42, folder)
        assert str(caught.value).startswith(said.format(source=source))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "older"]
    assert [path.name for path in older.iterdir()] == ["report.json"]
    assert (older / "report.json").read_text() == "older"


def test_an_older_folder_is_replaced_whole(chat_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "leftover").write_text("x")

    source = numbered(tmp_path / "chats.jsonl", 20)
    prepare(settings(source, eval={"share": 0.4}), chat_folder, 42, out)

    assert sorted(path.name for path in out.iterdir()) == [
        "eval.arrow",
        "eval_pairs.arrow",
        "report.json",
        "train.arrow",
        "train_pairs.arrow",
    ]


def test_a_place_that_cannot_be_written_is_named(chat_folder: Path, tmp_path: Path) -> None:
    source = numbered(tmp_path / "chats.jsonl", 20)

    with pytest.raises(RunError, match=f"{source}/data cannot be written: Not a directory"):
        prepare(settings(source), chat_folder, 42, source / "data")


def sources_of(path: Path) -> list[str]:
    return [row.source for row in read_rows(path)]


def test_a_weight_says_how_often_a_conversation_is_trained(
    chat_folder: Path, tmp_path: Path
) -> None:
    whole = numbered(tmp_path / "whole.jsonl", 40)
    half = numbered(tmp_path / "half.jsonl", 200, start=100)
    held = numbered(tmp_path / "held.jsonl", 4, start=1000)
    data = Data(
        sources=[{"path": str(whole), "weight": 2}, {"path": str(half), "weight": 0.5}],
        eval={"path": str(held)},
    )

    report = prepare(data, chat_folder, 42, tmp_path / "data")
    prepare(data, chat_folder, 43, tmp_path / "other")

    counts = Counter(sources_of(tmp_path / "data" / "train.arrow"))
    assert [counts[f"{whole}:{line}"] for line in range(1, 41)] == [2] * 40
    halves = [counts[f"{half}:{line}"] for line in range(1, 201)]
    assert set(halves) == {0, 1}
    assert 70 < sum(halves) < 130
    assert report["train"]["rows"] == 80 + sum(halves)
    assert report["duplicates"]["exact"] == 0
    assert counts != Counter(sources_of(tmp_path / "other" / "train.arrow"))


def test_a_share_is_of_all_conversations(chat_folder: Path, tmp_path: Path) -> None:
    own = numbered(tmp_path / "own.jsonl", 300)
    replay = numbered(tmp_path / "replay.jsonl", 1000, start=1000)
    rare = numbered(tmp_path / "rare.jsonl", 10, start=5000)
    held = numbered(tmp_path / "held.jsonl", 4, start=9000)
    data = Data(
        sources=[
            {"path": str(own)},
            {"path": str(replay), "share": 0.3},
            {"path": str(rare), "share": 0.1},
        ],
        eval={"path": str(held)},
    )

    prepare(data, chat_folder, 42, tmp_path / "data")

    counts = Counter(s.rpartition(":")[0] for s in sources_of(tmp_path / "data" / "train.arrow"))
    assert (counts[str(own)], counts[str(rare)]) == (300, 50)
    assert 120 < counts[str(replay)] < 180


def test_every_format_and_kind_of_file_goes_into_one_run(chat_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    numbered(folder / "a.jsonl", 3)
    numbered(folder / "b.jsonl", 3, start=3)
    alpaca = tmp_path / "alpaca.csv"
    alpaca.write_text("instruction,input,output\nAdd.,1+1,2\nAdd.,2+2,4\n")
    pairs = write(
        tmp_path / "pairs.json",
        json.dumps([{"prompt": "1+1?", "chosen": "2", "rejected": str(i)} for i in (3, 4)]),
    )
    texts = write(tmp_path / "texts.jsonl", json.dumps({"text": "A text of its own."}))
    held = numbered(tmp_path / "held.jsonl", 4, start=1000)

    report = prepare(
        settings(folder, alpaca, pairs, texts, eval={"path": str(held)}),
        chat_folder,
        42,
        tmp_path / "data",
    )

    assert [
        (s["format"], s["files"], s["conversations"], s["part"]) for s in report["sources"]
    ] == [
        ("messages", 2, 6, "train"),
        ("alpaca", 1, 2, "train"),
        ("preference", 1, 2, "train"),
        ("text", 1, 1, "train"),
        ("messages", 1, 4, "eval"),
    ]
    assert report["train"]["rows"] == 9
    assert report["train"]["text_rows"] == 1
    assert report["train"]["pairs"] == 2
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "eval.arrow",
        "eval_pairs.arrow",
        "report.json",
        "train.arrow",
        "train_pairs.arrow",
    ]


def test_a_record_of_another_format_than_its_source_is_refused(
    chat_folder: Path, tmp_path: Path
) -> None:
    mixed = write(tmp_path / "mixed.jsonl", FINE, json.dumps({"instruction": "x", "output": "y"}))

    with pytest.raises(DataError, match=f"^{mixed}:2: ") as caught:
        prepare(settings(mixed), chat_folder, 42, tmp_path / "data")

    assert "alpaca" in str(caught.value)


def test_a_format_may_be_named(chat_folder: Path, tmp_path: Path) -> None:
    both = ({"messages": [USER, DIRECT], "text": f"Only text {i}."} for i in range(30))
    source = write(tmp_path / "both.jsonl", *map(json.dumps, both))
    data = Data(sources=[{"path": str(source), "format": "text"}], eval={"share": 0.3})

    report = prepare(data, chat_folder, 42, tmp_path / "data")

    assert report["train"]["text_rows"] == report["train"]["rows"] > 0


@pytest.mark.slow
def test_rows_made_in_several_processes_are_those_made_in_one(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = numbered(tmp_path / "chats.jsonl", 60)
    source.write_text(source.read_text() + "broken\n" + row(USER) + "\n")
    data = settings(source, eval={"share": 0.3}, invalid="drop", soft_switches=0.5)
    alone = prepare(data, chat_folder, 42, tmp_path / "alone")
    monkeypatch.setattr(inputs, "RECORDS", 7)

    together = prepare(data, chat_folder, 42, tmp_path / "together")

    changed = {"epoch"}  # rows are estimated to share beginnings within a batch
    assert {k: v for k, v in together.items() if k not in changed} == {
        k: v for k, v in alone.items() if k not in changed
    }
    for name in ("train.arrow", "eval.arrow"):
        assert list(read_rows(tmp_path / "together" / name)) == list(
            read_rows(tmp_path / "alone" / name)
        )
    with pytest.raises(DataError, match=f"^{source}:61: not JSON"):
        prepare(
            data.model_copy(update={"invalid": "refuse"}), chat_folder, 42, tmp_path / "refused"
        )
    assert not list(tmp_path.glob("refused*"))


def test_what_is_probably_not_meant_is_a_warning(chat_folder: Path, tmp_path: Path) -> None:
    talk = row(USER | {"name": "Ann"}, {"role": "assistant", "content": "It is </think>."})
    source = write(tmp_path / "chats.jsonl", FINE, FINE, talk, row(USER, {**DIRECT, "x": 1}))
    held = write(tmp_path / "held.jsonl", FINE)

    report = prepare(settings(source, eval={"path": str(held)}), chat_folder, 42, tmp_path / "data")
    unthinking = prepare(
        settings(source, eval={"path": str(held)}, thinking="never"),
        chat_folder,
        42,
        tmp_path / "never",
    )

    assert [warning.partition(":")[0] for warning in report["warnings"]] == [
        "answers with a literal tag of the dialogue in their text",
        "messages with a name, which the template has no place for",
        "conversations that are copies of others",
        "held-out conversations that are also trained on",
        "no row in thinking mode, so the model may forget how to think (mix in what `pipeline "
        "replay` writes, or set data.thinking=never); rows",
    ]
    assert unthinking["warnings"] == report["warnings"][:-1]


def test_secrets_are_found_in_everything_a_model_would_see(
    chat_folder: Path, tmp_path: Path
) -> None:
    key = "sk-" + "a8Kd93jfKs0Qmv82" * 2
    call = {"function": {"name": "f", "arguments": {"key": key}}}
    talks = [
        row(USER | {"content": f"My key is {key}."}, DIRECT),
        row({"role": "system", "content": f"Use {key}."}, USER, DIRECT),
        row(USER, THOUGHT | {"reasoning": f"They gave {key}."}),
        row(USER, {"role": "assistant", "tool_calls": [call]}),
        row(USER, DIRECT),
    ]
    source = write(tmp_path / "chats.jsonl", *talks)
    held = write(tmp_path / "held.jsonl", row(USER, THOUGHT))

    report = prepare(settings(source, eval={"path": str(held)}), chat_folder, 42, tmp_path / "data")

    assert report["secrets"] == {
        "OpenAI-style key": {
            "count": 4,
            "examples": [f"{source}:{line}" for line in range(1, 5)],
        }
    }
    assert key not in json.dumps(report)


def test_a_conversation_in_two_sources_has_two_chances(chat_folder: Path, tmp_path: Path) -> None:
    one = numbered(tmp_path / "one.jsonl", 200)
    two = numbered(tmp_path / "two.jsonl", 200)
    held = numbered(tmp_path / "held.jsonl", 4, start=1000)
    sources = [{"path": str(path), "weight": 0.5} for path in (one, two)]

    prepare(Data(sources=sources, eval={"path": str(held)}), chat_folder, 42, tmp_path / "data")

    lines = Counter(s.rpartition(":")[2] for s in sources_of(tmp_path / "data" / "train.arrow"))
    assert set(Counter(lines.values())) == {1, 2}


def test_what_a_model_sees_alike_is_held_out_together(chat_folder: Path, tmp_path: Path) -> None:
    def talk(i: int, call_id: str, arguments: Any) -> str:
        call = {"id": call_id, "function": {"name": "f", "arguments": arguments}}
        return row(
            {"role": "user", "content": f"Call {i}."}, {"role": "assistant", "tool_calls": [call]}
        )

    source = write(
        tmp_path / "chats.jsonl",
        *(talk(i, "a", {"i": i}) for i in range(60)),
        *(talk(i, "b", json.dumps({"i": i})) for i in range(60)),
    )

    report = prepare(settings(source, eval={"share": 0.4}), chat_folder, 42, tmp_path / "data")

    assert report["overlap"]["exact"] == 0
    assert report["duplicates"]["exact"] == 60


def test_held_out_conversations_are_never_weighed(chat_folder: Path, tmp_path: Path) -> None:
    source = numbered(tmp_path / "chats.jsonl", 60)
    data = Data(sources=[{"path": str(source), "weight": 3}], eval={"share": 0.4})

    report = prepare(data, chat_folder, 42, tmp_path / "data")

    counts = {
        part: Counter(sources_of(tmp_path / "data" / f"{part}.arrow")) for part in ("train", "eval")
    }
    assert set(counts["train"].values()) == {3}
    assert set(counts["eval"].values()) == {1}
    assert len(counts["train"]) + len(counts["eval"]) == 60
    train = report["train"]
    assert train["conversations"] == train["rows"] == 3 * len(counts["train"])
    for histogram in report["histograms"]["train"].values():
        assert sum(histogram.values()) == train["rows"]


def test_what_is_not_trained_is_not_counted(chat_folder: Path, tmp_path: Path) -> None:
    """A weight of almost nothing leaves all of a source out, however long its rows are."""
    source = numbered(tmp_path / "chats.jsonl", 5)
    long = write(
        tmp_path / "long.jsonl", row({"role": "user", "content": "x" * 3000, "name": "Al"}, DIRECT)
    )
    held = numbered(tmp_path / "held.jsonl", 4, start=1000)
    data = Data(
        sources=[{"path": str(source)}, {"path": str(long), "weight": 1e-9}],
        eval={"path": str(held)},
    )

    report = prepare(data, chat_folder, 42, tmp_path / "data")

    assert report["train"]["longest_row"] < 1000
    assert report["train"]["conversations"] == 5
    assert report["noted"] == {}


def test_a_conversation_without_a_row_is_not_counted(chat_folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "chats.jsonl", FINE, row(USER, {**DIRECT, "content": "x" * 5000}))
    held = numbered(tmp_path / "held.jsonl", 4, start=1000)

    report = prepare(settings(source, eval={"path": str(held)}), chat_folder, 42, tmp_path / "data")

    assert (report["train"]["conversations"], report["train"]["rows"]) == (1, 1)
    assert report["noted"] == {"overlong": 1}


@pytest.mark.parametrize("first", ["[1]", '{"x": 1}', "broken"])
def test_an_invalid_first_record_is_dropped_like_any_other(
    chat_folder: Path, tmp_path: Path, first: str
) -> None:
    source = write(tmp_path / "chats.jsonl", first, FINE)
    held = numbered(tmp_path / "held.jsonl", 4, start=1000)
    data = settings(source, eval={"path": str(held)}, invalid="drop")

    report = prepare(data, chat_folder, 42, tmp_path / "data")

    assert (report["train"]["rows"], report["noted"]) == (1, {"invalid": 1})
    with pytest.raises(DataError, match=f"^{source}:1: "):
        prepare(
            data.model_copy(update={"invalid": "refuse"}), chat_folder, 42, tmp_path / "refused"
        )


def test_pairs_alone_are_checked_and_stored(chat_folder: Path, tmp_path: Path) -> None:
    pairs = (
        json.dumps({"prompt": f"{i}+1?", "chosen": str(i + 1), "rejected": "no"}) for i in range(30)
    )
    source = write(tmp_path / "pairs.jsonl", *pairs)

    report = prepare(settings(source, eval={"share": 0.4}), chat_folder, 42, tmp_path / "data")

    assert report["train"]["rows"] == report["eval"].get("rows") == 0
    assert report["train"]["pairs"] + report["eval"]["pairs"] == 30
    for part, name in (("train", "train_pairs"), ("eval", "eval_pairs")):
        rows = [
            (row.prompt_ids, row.completion_ids)
            for row in read_rows(tmp_path / "data" / f"{name}.arrow")
        ]
        sizes = [count_tree_tokens(rows[at : at + 2]) for at in range(0, len(rows), 2)]
        counts = report[part]
        assert counts["pairs"] == len(sizes) > 5
        assert counts["pair_tokens"] == sum(len(prompt) + len(reply) for prompt, reply in rows)
        assert counts["shared_pair_tokens"] == sum(sizes)
        assert counts["supervised_pair_tokens"] == sum(len(reply) for _, reply in rows)
        assert counts["longest_pair"] == max(sizes) < sum(sizes)


def test_a_switch_does_not_pass_for_thinking(chat_folder: Path, tmp_path: Path) -> None:
    talks = (row({"role": "user", "content": f"Say {i}."}, DIRECT) for i in range(20))
    source = write(tmp_path / "chats.jsonl", *talks)
    data = settings(source, eval={"share": 0.4}, soft_switches=1)

    report = prepare(data, chat_folder, 42, tmp_path / "data")

    assert report["train"]["thinking_rows"] > 0
    assert any(w.startswith("no row in thinking mode") for w in report["warnings"])


def test_a_share_is_weighed_against_what_the_others_weigh(tmp_path: Path) -> None:
    twice, half = numbered(tmp_path / "twice.jsonl", 10), numbered(tmp_path / "half.jsonl", 4)
    replay = numbered(tmp_path / "replay.jsonl", 30)
    data = Data(
        sources=[
            {"path": str(replay), "share": 0.2, "cap": 11},
            {"path": str(twice), "weight": 2},
            {"path": str(half), "weight": 0.5},
        ]
    )

    weights = [each.weight for each in inputs.find_inputs(data, {})]

    assert weights == pytest.approx([(10 * 2 + 4 * 0.5) / 0.8 * 0.2 / 11, 2, 0.5])


def test_what_is_never_trained_is_no_duplicate_and_no_secret(
    chat_folder: Path, tmp_path: Path
) -> None:
    key = "sk-" + "a8Kd93jfKs0Qmv82" * 2
    talk = row(USER | {"content": f"My key is {key}."}, DIRECT)
    source = numbered(tmp_path / "chats.jsonl", 5)
    unused = write(tmp_path / "unused.jsonl", talk, talk, FINE)
    held = write(tmp_path / "held.jsonl", FINE)
    sources = [{"path": str(source)}, {"path": str(unused), "weight": 1e-9}]
    data = Data(sources=sources, eval={"path": str(held)})

    report = prepare(data, chat_folder, 42, tmp_path / "data")

    assert report["train"]["conversations"] == 5
    assert report["duplicates"] == report["overlap"] == {"exact": 0, "near": 0, "examples": []}
    assert report["secrets"] == {}


def test_a_weight_of_three_counts_as_three_files_of_the_same(
    chat_folder: Path, tmp_path: Path
) -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    calls = {"role": "assistant", "tool_calls": [call, call]}
    talks = [
        row(USER, calls, {"role": "tool", "content": "2"}, DIRECT, tools=tools),
        row(USER, THOUGHT, USER, DIRECT),
    ]
    lines = {
        "talks": talks,
        "texts": [json.dumps({"text": "A text of its own."})],
        "pairs": [json.dumps({"prompt": "1+1?", "chosen": "2", "rejected": "3"})],
    }
    paths = [write(tmp_path / f"{name}.jsonl", *some) for name, some in lines.items()]
    held = numbered(tmp_path / "held.jsonl", 2, start=1000)
    weighed = [{"path": str(path), "weight": 3} for path in paths]
    repeated = [{"path": str(path)} for path in paths * 3]

    one, other = (
        prepare(Data(sources=sources, eval={"path": str(held)}), chat_folder, 42, tmp_path / name)
        for name, sources in (("weighed", weighed), ("repeated", repeated))
    )

    assert one["train"] == other["train"]
    assert one["histograms"] == other["histograms"]
    assert (one["train"]["tool_calls"], one["train"]["rows_with_tools"]) == (6, 6)
    assert (one["train"]["pairs"], one["train"]["rows"]) == (3, 15)
    pairs = (tmp_path / "weighed" / "train_pairs.arrow").read_bytes()
    assert pa.ipc.open_stream(pairs).read_all().num_rows == 3
    assert sorted(sources_of(tmp_path / "weighed" / "train.arrow")) == sorted(
        sources_of(tmp_path / "repeated" / "train.arrow")
    )


def test_chance_is_another_for_each_purpose_and_each_seed() -> None:
    def drawn(seed: int, what: str) -> list[bool]:
        return [draw(seed, what, {"talk": i}) < 0.5 for i in range(400)]

    first = drawn(1, "held")

    assert first == drawn(1, "held")
    assert 160 < sum(first) < 240
    for other in (drawn(2, "held"), drawn(1, "copies")):
        assert 160 < sum(a == b for a, b in zip(first, other, strict=True)) < 240


def test_what_is_held_out_says_nothing_of_what_else_is_drawn(
    chat_folder: Path, tmp_path: Path
) -> None:
    talks = (row({"role": "user", "content": f"Say {i}."}, DIRECT) for i in range(200))
    source = write(tmp_path / "chats.jsonl", *talks)
    halved = Data(sources=[{"path": str(source), "weight": 0.5}], eval={"share": 0.5})
    switched = settings(source, eval={"share": 0.5}, soft_switches=0.5)

    half = prepare(halved, chat_folder, 42, tmp_path / "halved")
    some = prepare(switched, chat_folder, 42, tmp_path / "switched")

    assert 25 < half["train"]["rows"] < 75
    for part in ("train", "eval"):
        assert 25 < some[part]["thinking_rows"] < 75


def test_an_epoch_is_estimated_by_what_steps_of_sixteen_rows_share(
    chat_folder: Path, tmp_path: Path
) -> None:
    system = {"role": "system", "content": "Be brief, and say it as it is."}
    talks = (row(system, {"role": "user", "content": f"Say {i}."}, DIRECT) for i in range(40))
    source = write(tmp_path / "chats.jsonl", *talks)
    held = numbered(tmp_path / "held.jsonl", 2, start=1000)

    report = prepare(settings(source, eval={"path": str(held)}), chat_folder, 42, tmp_path / "data")

    ids = [(r.prompt_ids, r.completion_ids) for r in read_rows(tmp_path / "data" / "train.arrow")]
    shared = sum(count_tree_tokens(ids[start : start + 16]) for start in (0, 16, 32))
    row_tokens = sum(len(prompt) + len(completion) for prompt, completion in ids)
    assert report["epoch"] == {"row_tokens": row_tokens, "shared_tokens": shared}
    assert shared < row_tokens


def test_places_of_secrets_are_the_first_five_that_differ(
    chat_folder: Path, tmp_path: Path
) -> None:
    key = "sk-" + "a8Kd93jfKs0Qmv82" * 2
    twice = row(USER | {"content": f"{key} or {key}?"}, DIRECT | {"content": key})
    once = (row(USER | {"content": f"{i}: {key}"}, DIRECT) for i in range(6))
    source = write(tmp_path / "chats.jsonl", twice, *once)
    held = numbered(tmp_path / "held.jsonl", 2, start=1000)

    report = prepare(settings(source, eval={"path": str(held)}), chat_folder, 42, tmp_path / "data")

    places = [f"{source}:{line}" for line in range(1, 6)]
    assert report["secrets"] == {"OpenAI-style key": {"count": 9, "examples": places}}
