"""Data: faults name file and line, rows are what was promised, nothing half-written stays."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from pipeline.chat import Chat
from pipeline.data.messages import Conversation, read_conversations
from pipeline.data.prepare import prepare
from pipeline.data.rows import Row, make_rows
from pipeline.data.store import read_rows, write_rows
from pipeline.errors import DataError, RunError
from pipeline.recipe import Data
from pipeline.run import read_json

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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [', "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ("[]", 'a conversation must look like {"messages": [...]}'),
        ("{}", 'a conversation must look like {"messages": [...]}'),
        ('{"messages": {}}', 'a conversation must look like {"messages": [...]}'),
        (row("hi", DIRECT), "message 0 is not a JSON object"),
        (row(USER, {"role": "bot", "content": "2"}), "message 1: role 'bot' is none of system,"),
        (row({"content": "x"}, DIRECT), "message 0: role None is none of"),
        (row({"role": [], "content": "x"}, DIRECT), "message 0: role [] is none of"),
        (row(), "there is no assistant turn to learn from"),
        (row(USER), "there is no assistant turn to learn from"),
        (row(USER, {"role": "assistant"}), "message 1: an assistant turn with neither text nor"),
        (row(USER, {"role": "assistant", "content": " \n"}), "message 1: an assistant turn with"),
        (row({"role": "user", "content": 3}, DIRECT), "message 0: content must be text, not int"),
        (
            row({"role": "user", "content": [{"type": "image_url"}]}, DIRECT),
            "message 0: content part 'image_url' is not text",
        ),
        (row({"role": "user", "content": ["x"]}, DIRECT), "message 0: content part 'str' is not"),
        (row(USER, DIRECT | {"tool_calls": {}, "content": ""}), "message 1: an assistant turn"),
        (row(USER, DIRECT | {"tool_calls": "f"}), "message 1: tool_calls must be a list"),
        (row(USER, DIRECT | {"tool_calls": [3]}), "message 1: a tool call has no function name"),
        (
            row(USER, DIRECT | {"tool_calls": [{"function": {"arguments": "{}"}}]}),
            "message 1: a tool call has no function name",
        ),
        *(
            (
                row(USER, DIRECT | {"tool_calls": [{"function": {"name": "f", "arguments": bad}}]}),
                "message 1: a tool call's arguments are not a JSON object",
            )
            for bad in ('{"a": 1', "[1]", [1])
        ),
        (row(USER, DIRECT, tools={}), None),
        (row(USER, DIRECT, tools=["f"]), "tools must be a list of JSON objects"),
        (row(USER, DIRECT, tools="[{"), "tools must be a list of JSON objects"),
        (row({"role": "user", "content": "\ud83d"}, DIRECT), "\\ud83d is half a character"),
    ],
)
def test_a_faulty_line_is_named_and_the_others_are_read(
    tmp_path: Path, line: str, said: str | None
) -> None:
    path = write(tmp_path / "chats.jsonl", FINE, "", line, FINE)

    found = list(read_conversations(path))

    faults = [str(item) for item in found if isinstance(item, DataError)]
    lines = [item.line for item in found if isinstance(item, Conversation)]
    if said is None:
        assert (faults, lines) == ([], [1, 3, 4])
        return
    assert lines == [1, 4]
    assert len(faults) == 1
    assert faults[0].startswith(f"{path}:3: {said}")
    assert "\n" not in faults[0]


def test_a_conversation_knows_its_line_and_its_tools(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    path = write(
        tmp_path / "chats.jsonl",
        row(USER, DIRECT, tools=tools),
        row(USER, DIRECT, tools=json.dumps(tools)),
    )

    found = list(read_conversations(path))

    assert found == [
        Conversation((USER, DIRECT), tuple(tools), path, 1),
        Conversation((USER, DIRECT), tuple(tools), path, 2),
    ]
    assert [item.source for item in found if isinstance(item, Conversation)] == [
        f"{path}:1",
        f"{path}:2",
    ]


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(f"{FINE}\r\n\r\n{FINE}".encode())

    assert [item.line for item in read_conversations(path) if isinstance(item, Conversation)] == [
        1,
        3,
    ]


def test_text_that_is_not_utf8_is_named_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(f"{FINE}\n{FINE}\n".encode() + b'{"messages": ["caf\xe9"]}\n')

    with pytest.raises(DataError) as caught:
        list(read_conversations(path))

    assert str(caught.value).startswith(f"{path}:3: not UTF-8 text")


def test_a_file_that_is_missing_empty_or_a_folder_is_named(tmp_path: Path) -> None:
    missing, empty = tmp_path / "none.jsonl", write(tmp_path / "empty.jsonl")

    with pytest.raises(DataError, match=rf"{missing} is missing; .* start at {Path.cwd()}"):
        list(read_conversations(missing))
    with pytest.raises(DataError, match=f"{empty} is empty: it needs one conversation a line"):
        list(read_conversations(empty))
    with pytest.raises(DataError, match=f"{tmp_path} cannot be read: Is a directory"):
        list(read_conversations(tmp_path))


def conversation(*messages: dict[str, Any]) -> Conversation:
    return Conversation(messages, (), Path("chats.jsonl"), 7)


def rows_of(chat: Chat, counts: Counter[str], *messages: dict[str, Any], **more: Any) -> list[Row]:
    return make_rows(conversation(*messages), chat, settings(Path("x"), **more), counts)


def test_each_assistant_turn_is_one_row_in_its_own_mode(chat: Chat) -> None:
    counts: Counter[str] = Counter()

    first, second = rows_of(chat, counts, USER, THOUGHT, USER, DIRECT)

    assert (first.source, first.turn, first.mode) == ("chats.jsonl:7", 1, "thinking")
    assert (second.source, second.turn, second.mode) == ("chats.jsonl:7", 3, "direct")
    assert chat.decode(first.completion_ids) == "<think>\nOne and one.\n</think>\n\n2<|im_end|>"
    assert chat.decode(second.completion_ids) == "2<|im_end|>"
    assert second.prompt_ids == chat.prompt_ids([USER, THOUGHT, USER], None, "direct")
    assert not counts


def test_turns_last_trains_only_the_last_turn(chat: Chat) -> None:
    (only,) = rows_of(chat, Counter(), USER, THOUGHT, USER, DIRECT, turns="last")

    assert only.turn == 3


def test_thinking_never_leaves_all_reasoning_out(chat: Chat) -> None:
    details = {"reasoning_details": [{"type": "reasoning.text", "text": "One and one."}]}
    in_details = DIRECT | details

    rows = rows_of(chat, Counter(), USER, THOUGHT, USER, in_details, thinking="never")

    assert [row.mode for row in rows] == ["direct", "direct"]
    assert "One and one" not in "".join(chat.decode(r.prompt_ids + r.completion_ids) for r in rows)


def test_thinking_always_trains_only_turns_with_reasoning_and_counts_the_others(chat: Chat) -> None:
    counts: Counter[str] = Counter()

    rows = rows_of(chat, counts, USER, THOUGHT, USER, DIRECT, thinking="always")

    assert [row.turn for row in rows] == [1]
    assert counts == {"without_reasoning": 1}


def test_an_overlong_row_is_dropped_and_counted_never_cut(chat: Chat) -> None:
    counts: Counter[str] = Counter()
    whole = rows_of(chat, counts, USER, DIRECT, USER, DIRECT)
    sizes = [len(row.prompt_ids) + len(row.completion_ids) for row in whole]

    rows = rows_of(chat, counts, USER, DIRECT, USER, DIRECT, max_tokens=sizes[0])

    assert rows == whole[:1]
    assert counts == {"overlong": 1}
    assert not rows_of(chat, Counter(), USER, DIRECT, max_tokens=sizes[0] - 1)


def test_an_overlong_row_may_be_refused_by_name(chat: Chat) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(chat, Counter(), USER, DIRECT, overlong="refuse", max_tokens=9)

    assert str(caught.value).startswith("chats.jsonl:7: message 1: the row has ")
    assert "data.max_tokens is 9" in str(caught.value)


def test_a_conversation_without_a_user_turn_is_refused(chat: Chat) -> None:
    with pytest.raises(DataError, match=r"^chats.jsonl:7: no assistant turn follows a user turn$"):
        rows_of(chat, Counter(), {"role": "system", "content": "x"}, DIRECT)


def test_what_the_template_cannot_express_is_named_by_line(
    chat_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    template = "{{ raise_exception('roles must alternate') }}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    with pytest.raises(
        DataError, match=r"^chats.jsonl:7: the template cannot express .* alternate$"
    ):
        rows_of(Chat(folder), Counter(), USER, DIRECT)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "the template does not end the turn with <|im_end|>",
        ),
        (
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            "message 1: the trained ids do not decode to the answer",
        ),
    ],
)
def test_rows_of_a_foreign_checkpoint_are_held_to_the_promise(
    chat_folder: Path, tmp_path: Path, template: str, said: str
) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if "decode" in said:
        tokenizer.normalizer = normalizers.Replace("2", "3")
    tokenizer.save(str(folder / "tokenizer.json"))

    with pytest.raises(DataError) as caught:
        rows_of(Chat(folder), Counter(), USER, DIRECT)

    assert said in str(caught.value)


def test_decomposed_accents_are_trained_as_the_tokenizer_composes_them(
    chat_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = Chat(folder)

    (row,) = rows_of(chat, Counter(), USER, {"role": "assistant", "content": "cafe\u0301"})

    assert chat.decode(row.completion_ids) == "caf\u00e9<|im_end|>"


def keyed(path: Path) -> set[str]:
    """The rows of a file by their ids alone."""
    return {f"{row.prompt_ids}{row.completion_ids}" for row in read_rows(path)}


def test_the_report_adds_up_to_the_rows_on_disk(chat: Chat, tmp_path: Path) -> None:
    source = numbered(tmp_path / "chats.jsonl", 60)
    out = tmp_path / "data"

    report = prepare(settings(source, eval={"share": 0.3}), chat, 42, out)

    assert read_json(out / "report.json") == report
    assert report["noted"] == {"conversations": 60}
    for part in ("train", "eval"):
        rows = list(read_rows(out / f"{part}.arrow"))
        sizes = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
        assert report[part] == {
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


def test_a_share_is_held_out_by_content_wherever_it_stands(chat: Chat, tmp_path: Path) -> None:
    whole = numbered(tmp_path / "whole.jsonl", 40)
    lines = whole.read_text("utf-8").splitlines()
    first = write(tmp_path / "first.jsonl", *reversed(lines[:25]))
    second = write(tmp_path / "second.jsonl", *lines[20:])
    held = {"share": 0.4}

    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    prepare(settings(whole, eval=held), chat, 42, one)
    prepare(settings(first, second, eval=held), chat, 42, two)
    prepare(settings(whole, eval=held), chat, 43, other)

    train, kept = keyed(one / "train.arrow"), keyed(one / "eval.arrow")
    assert len(train) + len(kept) == 40
    assert train.isdisjoint(kept)
    assert (keyed(two / "train.arrow"), keyed(two / "eval.arrow")) == (train, kept)
    assert keyed(other / "eval.arrow") != kept


def test_preparing_twice_gives_the_same_bytes(chat: Chat, tmp_path: Path) -> None:
    data = settings(numbered(tmp_path / "chats.jsonl", 20))

    reports = [prepare(data, chat, 42, tmp_path / name) for name in ("one", "two")]

    assert reports[0] == reports[1]
    for name in ("train.arrow", "eval.arrow", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_held_out_rows_may_come_from_a_file_of_their_own(chat: Chat, tmp_path: Path) -> None:
    source = numbered(tmp_path / "chats.jsonl", 6)
    held = numbered(tmp_path / "held.jsonl", 4, start=100)
    out = tmp_path / "data"

    report = prepare(settings(source, eval={"path": str(held)}), chat, 42, out)

    assert (report["train"]["rows"], report["eval"]["rows"]) == (6, 4)
    assert {row.source for row in read_rows(out / "eval.arrow")} == {
        f"{held}:{line}" for line in range(1, 5)
    }


def test_a_cap_takes_conversations_from_the_top(chat: Chat, tmp_path: Path) -> None:
    source = numbered(tmp_path / "chats.jsonl", 9)
    held = numbered(tmp_path / "held.jsonl", 1, start=100)
    data = Data(sources=[{"path": str(source), "cap": 2}], eval={"path": str(held)})

    prepare(data, chat, 42, tmp_path / "data")

    sources = [row.source for row in read_rows(tmp_path / "data" / "train.arrow")]
    assert sources == [f"{source}:1", f"{source}:2"]


def test_invalid_conversations_are_dropped_and_counted_where_the_recipe_says_so(
    chat: Chat, tmp_path: Path
) -> None:
    source = numbered(tmp_path / "chats.jsonl", 20)
    system_only = row({"role": "system", "content": "x"}, DIRECT)
    source.write_text(f"{system_only}\nbroken\n{source.read_text('utf-8')}{row(USER)}\n")
    data = settings(source, eval={"share": 0.3}, invalid="drop")

    report = prepare(data, chat, 42, tmp_path / "data")

    assert report["train"]["rows"] + report["eval"]["rows"] == 20
    assert report["noted"] == {"conversations": 21, "invalid": 3}


@pytest.mark.parametrize(
    ("lines", "more", "said"),
    [
        ([FINE, "broken"], {}, "{source}:2: not JSON"),
        ([FINE, row({"role": "system", "content": "x"}, DIRECT)], {}, "{source}:2: no assistant"),
        ([FINE], {"max_tokens": 2}, "no row is left to train on; see data.max_tokens"),
        ([FINE], {"thinking": "always"}, "no row is left to train on"),
        (["broken"], {"invalid": "drop"}, "no row is left to train on"),
        ([FINE], {"eval": {"share": 1e-9}}, "no row is held out; name data.eval.path"),
        ([FINE], {"eval": {"path": "none.jsonl"}}, "none.jsonl is missing"),
    ],
)
def test_a_refusal_leaves_nothing_and_keeps_what_was_there(
    chat: Chat, tmp_path: Path, lines: list[str], more: dict[str, Any], said: str
) -> None:
    source = write(tmp_path / "chats.jsonl", *lines)
    out, older = tmp_path / "data", tmp_path / "older"
    older.mkdir()
    (older / "report.json").write_text("older")

    for folder in (out, older):
        with pytest.raises(DataError) as caught:
            prepare(settings(source, **more), chat, 42, folder)
        assert str(caught.value).startswith(said.format(source=source))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "older"]
    assert [path.name for path in older.iterdir()] == ["report.json"]
    assert (older / "report.json").read_text() == "older"


def test_an_older_folder_is_replaced_whole(chat: Chat, tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "leftover").write_text("x")

    prepare(settings(numbered(tmp_path / "chats.jsonl", 20)), chat, 42, out)

    assert sorted(path.name for path in out.iterdir()) == [
        "eval.arrow",
        "report.json",
        "train.arrow",
    ]


def test_a_place_that_cannot_be_written_is_named(chat: Chat, tmp_path: Path) -> None:
    source = numbered(tmp_path / "chats.jsonl", 20)

    with pytest.raises(RunError, match=f"{source}/data cannot be written: Not a directory"):
        prepare(settings(source), chat, 42, source / "data")


ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
generated_rows = st.builds(
    Row,
    prompt_ids=ids,
    completion_ids=ids,
    source=st.text(max_size=9),
    turn=st.integers(0, 2**31 - 1),
    mode=st.sampled_from(["thinking", "direct"]),
)


@given(st.lists(generated_rows, max_size=8))
def test_rows_come_back_from_the_disk_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row]
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.arrow"

    write_rows(path, iter(rows))

    assert list(read_rows(path)) == rows


def test_more_rows_than_one_batch_keep_their_order(tmp_path: Path) -> None:
    rows = [Row([i], [i + 1], f"x:{i}", 1, "direct") for i in range(2500)]

    sha256 = write_rows(tmp_path / "rows.arrow", rows)

    assert list(read_rows(tmp_path / "rows.arrow")) == rows
    assert sha256 != write_rows(tmp_path / "rows.arrow", reversed(rows))
