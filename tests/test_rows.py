"""Rows: one per trained turn, whatever the conversation; what was left out is counted."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

from pipeline.chat import Chat
from pipeline.data.conversation import Conversation, Document, Pair
from pipeline.data.notes import Notes
from pipeline.data.rows import Row, make_pair_rows, make_rows, make_text_rows
from pipeline.errors import DataError
from pipeline.recipe import Data

USER = {"role": "user", "content": "How much is 1+1?"}
DIRECT = {"role": "assistant", "content": "2"}
THOUGHT = {"role": "assistant", "content": "2", "reasoning": "One and one."}


def conversation(*messages: dict[str, Any]) -> Conversation:
    return Conversation(messages, (), Path("chats.jsonl"), 7)


def rows_of(chat: Chat, notes: Notes, *messages: dict[str, Any], **more: Any) -> list[Row]:
    data = Data(sources=[{"path": "x"}], **more)
    return make_rows(conversation(*messages), chat, data, 42, notes)


def test_each_assistant_turn_is_one_row_in_its_own_mode(chat: Chat) -> None:
    notes = Notes()

    first, second = rows_of(chat, notes, USER, THOUGHT, USER, DIRECT)

    assert (first.source, first.turn, first.mode) == ("chats.jsonl:7", 1, "thinking")
    assert (second.source, second.turn, second.mode) == ("chats.jsonl:7", 3, "direct")
    assert chat.decode(first.completion_ids) == "<think>\nOne and one.\n</think>\n\n2<|im_end|>"
    assert chat.decode(second.completion_ids) == "2<|im_end|>"
    assert second.prompt_ids == chat.prompt_ids([USER, THOUGHT, USER], None, "direct")
    assert not notes.counts


def test_turns_last_trains_only_the_last_turn(chat: Chat) -> None:
    (only,) = rows_of(chat, Notes(), USER, THOUGHT, USER, DIRECT, turns="last")

    assert only.turn == 3


def test_thinking_never_leaves_all_reasoning_out(chat: Chat) -> None:
    details = {"reasoning_details": [{"type": "reasoning.text", "text": "One and one."}]}
    in_details = DIRECT | details

    rows = rows_of(chat, Notes(), USER, THOUGHT, USER, in_details, thinking="never")

    assert [row.mode for row in rows] == ["direct", "direct"]
    assert "One and one" not in "".join(chat.decode(r.prompt_ids + r.completion_ids) for r in rows)


def test_thinking_always_trains_only_turns_with_reasoning_and_counts_the_others(chat: Chat) -> None:
    notes = Notes()

    rows = rows_of(chat, notes, USER, THOUGHT, USER, DIRECT, thinking="always")

    assert [row.turn for row in rows] == [1]
    assert notes.counts == {"without_reasoning": 1}


def test_an_overlong_row_is_dropped_and_counted_never_cut(chat: Chat) -> None:
    notes = Notes()
    whole = rows_of(chat, notes, USER, DIRECT, USER, DIRECT)
    sizes = [len(row.prompt_ids) + len(row.completion_ids) for row in whole]

    rows = rows_of(chat, notes, USER, DIRECT, USER, DIRECT, max_tokens=sizes[0])

    assert rows == whole[:1]
    assert notes.counts == {"overlong": 1}
    assert not rows_of(chat, Notes(), USER, DIRECT, max_tokens=sizes[0] - 1)


def test_an_overlong_row_may_be_refused_by_name(chat: Chat) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(chat, Notes(), USER, DIRECT, overlong="refuse", max_tokens=9)

    assert str(caught.value).startswith("chats.jsonl:7: message 1: the row has ")
    assert "data.max_tokens is 9" in str(caught.value)


def test_a_conversation_without_a_user_turn_is_refused(chat: Chat) -> None:
    with pytest.raises(DataError, match=r"^chats.jsonl:7: no assistant turn follows a user turn$"):
        rows_of(chat, Notes(), {"role": "system", "content": "x"}, DIRECT)


def test_what_the_template_cannot_express_is_named_by_line(
    chat_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    template = "{{ raise_exception('roles must alternate') }}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    with pytest.raises(
        DataError, match=r"^chats.jsonl:7: the template cannot express .* alternate$"
    ):
        rows_of(Chat(folder), Notes(), USER, DIRECT)


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
        rows_of(Chat(folder), Notes(), USER, DIRECT)

    assert said in str(caught.value)


def test_decomposed_accents_are_trained_as_the_tokenizer_composes_them(
    chat_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = Chat(folder)

    (row,) = rows_of(chat, Notes(), USER, {"role": "assistant", "content": "cafe\u0301"})

    assert chat.decode(row.completion_ids) == "caf\u00e9<|im_end|>"


def ask(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, reasoning: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"reasoning": reasoning} if reasoning else {})


def texts(chat: Chat, rows: list[Row]) -> list[tuple[str, str]]:
    return [(chat.decode(row.prompt_ids), chat.decode(row.completion_ids)) for row in rows]


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}])
def test_a_turn_marked_as_untrained_is_context_and_counted(
    chat: Chat, mark: dict[str, Any]
) -> None:
    notes = Notes()

    rows = rows_of(chat, notes, USER, DIRECT | mark, USER, THOUGHT)

    assert rows == rows_of(chat, Notes(), USER, DIRECT, USER, THOUGHT)[1:]
    assert notes.counts == {"context_only": 1}
    assert [r.turn for r in rows_of(chat, Notes(), USER, THOUGHT, USER, DIRECT | mark)] == [1]
    assert [
        r.turn for r in rows_of(chat, Notes(), USER, THOUGHT, USER, DIRECT | mark, turns="last")
    ] == [1]


def test_an_answer_before_any_question_is_context_and_counted(chat: Chat) -> None:
    notes = Notes()

    (row,) = rows_of(chat, notes, answer("Hello!"), USER, DIRECT)

    assert row.turn == 2
    assert "Hello!" in chat.decode(row.prompt_ids)
    assert notes.counts == {"context_only": 1}


def test_a_conversation_that_ends_in_a_question_trains_what_was_answered(chat: Chat) -> None:
    notes = Notes()

    rows = rows_of(chat, notes, USER, DIRECT, ask("And 2+2?"))

    assert rows == rows_of(chat, Notes(), USER, DIRECT)
    assert notes.counts == {"unanswered": 1}


def test_names_and_stray_tags_are_counted_with_their_place(chat: Chat) -> None:
    notes = Notes()

    (row,) = rows_of(chat, notes, USER | {"name": "Ann"}, answer("It writes </think> at the end."))

    assert notes.counts == {"names": 1, "stray_tags": 1}
    assert notes.examples["stray_tags"] == ["chats.jsonl:7: message 1"]
    assert chat.decode(row.completion_ids) == "It writes </think> at the end.<|im_end|>"
    assert chat.token_id("</think>") not in row.completion_ids


@pytest.mark.parametrize(
    ("content", "reasoning", "said"),
    [
        ("<think>\nOne and one.\n</think>\n\n2", "One and one.", "2"),
        ("<think>One and one.</think>2", "One and one.", "2"),
        (" \n<think>\n\n</think>\n\n2", "", "2"),
        ("<think>a</think>\n\n    indented", "a", "    indented"),
        ("<think>a</think>\n\nIt wrote </think>.", "a", "It wrote </think>."),
        ([{"type": "text", "text": "<think>a</think>2"}], "a", "2"),
    ],
)
def test_a_think_block_in_the_content_is_reasoning(
    chat: Chat, content: Any, reasoning: str, said: str
) -> None:
    inline = {"role": "assistant", "content": content}

    rows = rows_of(chat, Notes(), USER, inline, USER, DIRECT)

    assert rows == rows_of(chat, Notes(), USER, answer(said, reasoning), USER, DIRECT)
    assert rows[0].mode == ("thinking" if reasoning else "direct")
    hidden = rows_of(chat, Notes(), USER, inline, USER, DIRECT, thinking="never")
    assert hidden == rows_of(chat, Notes(), USER, answer(said), USER, DIRECT)


def test_named_reasoning_leaves_a_block_in_the_content_as_text(chat: Chat) -> None:
    (row,) = rows_of(chat, Notes(), USER, answer("<think> is a tag.</think>", "One."))

    assert chat.decode(row.completion_ids).endswith("\n\n<think> is a tag.</think><|im_end|>")


def test_split_history_leaves_out_the_oldest_turns_until_the_row_fits(chat: Chat) -> None:
    system = {"role": "system", "content": "Be brief."}
    talk = [m for i in range(6) for m in (ask(f"Question {i}?"), answer(f"Answer {i}."))]
    whole = rows_of(chat, Notes(), system, *talk)
    sizes = [len(row.prompt_ids) + len(row.completion_ids) for row in whole]
    notes = Notes()

    rows = rows_of(chat, notes, system, *talk, overlong="split_history", max_tokens=sizes[2])

    assert [row.turn for row in rows] == [row.turn for row in whole]
    assert [row.completion_ids for row in rows] == [row.completion_ids for row in whole]
    assert rows[:3] == whole[:3]
    assert [chat.decode(row.prompt_ids) for row in rows[3:]] == [
        chat.render([system, *talk[2 * i - 4 : 2 * i + 1]], None, "direct") for i in (3, 4, 5)
    ]
    assert notes.counts == {"history_split": 3}


def test_split_history_keeps_the_question_with_all_its_calls(chat: Chat) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "x" * 50}
    chain = [ask("Old?"), answer("Old."), USER, call, result, call, result, DIRECT]
    (kept,) = rows_of(chat, Notes(), *chain[2:], turns="last")
    size = len(kept.prompt_ids) + len(kept.completion_ids)
    notes = Notes()

    rows = rows_of(chat, notes, *chain, turns="last", overlong="split_history", max_tokens=size)
    none = rows_of(chat, notes, *chain, turns="last", overlong="split_history", max_tokens=size - 1)

    assert [(row.prompt_ids, row.completion_ids, row.turn) for row in rows] == [
        (kept.prompt_ids, kept.completion_ids, 7)
    ]
    assert none == []
    assert notes.counts == {"history_split": 1, "overlong": 1}


def test_soft_switches_are_put_as_qwen_did(chat: Chat) -> None:
    notes = Notes()

    rows = rows_of(chat, notes, USER, THOUGHT, USER, DIRECT, soft_switches=1)

    (first_prompt, first), (second_prompt, second) = texts(chat, rows)
    assert first_prompt.endswith("1+1? /think<|im_end|>\n<|im_start|>assistant\n")
    assert first == "<think>\nOne and one.\n</think>\n\n2<|im_end|>"
    assert "1+1? /think<|im_end|>" in second_prompt
    assert second_prompt.endswith("1+1? /no_think<|im_end|>\n<|im_start|>assistant\n")
    assert second == "<think>\n\n</think>\n\n2<|im_end|>"
    assert [row.mode for row in rows] == ["thinking", "thinking"]
    assert notes.counts == {"switched_think": 1, "switched_no_think": 1}


def test_a_question_with_a_switch_or_two_modes_gets_none(chat: Chat) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    mixed = [USER, call | {"reasoning": "Look."}, {"role": "tool", "content": "2"}, DIRECT]
    switched = [ask("How much is 1+1? /no_think"), DIRECT]

    for talk in (mixed, switched):
        assert rows_of(chat, Notes(), *talk, soft_switches=1) == rows_of(chat, Notes(), *talk)


def test_the_last_switch_holds_until_another_comes(chat: Chat) -> None:
    talk = [m for i in range(40) for m in (ask(f"How much is {i}?"), (DIRECT, THOUGHT)[i % 3 == 0])]
    notes = Notes()

    rows = rows_of(chat, notes, *talk, soft_switches=0.1, max_tokens=100_000)

    prompt = chat.decode(rows[-1].prompt_ids)
    questions = re.findall(r"How much is (\d+)\?(?: (/\w+))?<", prompt)
    held, switched = "", 0
    for number, switch in questions:
        wanted = "/think" if int(number) % 3 == 0 else "/no_think"
        held = switch or held
        switched += bool(switch)
        assert held in ("", wanted)
    assert 5 < switched < 40


def test_switches_come_with_their_probability_and_by_seed(chat: Chat) -> None:
    data = Data(sources=[{"path": "x"}], soft_switches=0.3)
    talks = [conversation(ask(f"How much is {i}?"), DIRECT) for i in range(300)]
    notes = [Notes() for _ in range(3)]

    drawn = [
        [make_rows(talk, chat, data, seed, each) for talk in talks]
        for seed, each in zip((1, 1, 2), notes, strict=True)
    ]

    assert drawn[0] == drawn[1] != drawn[2]
    assert 60 < notes[0].counts["switched_no_think"] < 120


def test_a_plain_text_is_trained_whole_and_ends_once(chat: Chat) -> None:
    text = "One <|im_end|> two.\r\n三 🙂" * 5
    notes = Notes()
    data = Data(sources=[{"path": "x"}], max_tokens=40)
    end = chat.token_id("<|endoftext|>")

    rows = make_text_rows(Document(text, Path("t.jsonl"), 3), chat, data, notes)

    ids = [i for row in rows for i in row.completion_ids]
    assert chat.decode(ids) == text + "<|endoftext|>"
    assert [i for i in ids if i in chat.control_ids] == [end]
    assert [len(row.completion_ids) for row in rows[:-1]] == [40] * (len(rows) - 1)
    assert {(row.source, row.mode, tuple(row.prompt_ids)) for row in rows} == {
        ("t.jsonl:3", "text", ())
    }
    assert notes.counts == {"texts_cut": 1}


def pair(chosen: dict[str, Any], rejected: dict[str, Any]) -> Pair:
    return Pair((USER,), (), (chosen,), (rejected,), Path("pairs.jsonl"), 2)


def test_a_pair_shares_its_prompt_and_has_each_answers_own_row(chat: Chat) -> None:
    data = Data(sources=[{"path": "x"}])
    better, worse = answer("2", "One and one."), answer("3", "Three?")

    (row,) = make_pair_rows(pair(better, worse), chat, data, Notes())

    (good,), (bad,) = rows_of(chat, Notes(), USER, better), rows_of(chat, Notes(), USER, worse)
    assert row.prompt_ids == good.prompt_ids == bad.prompt_ids
    assert (row.chosen_ids, row.rejected_ids) == (good.completion_ids, bad.completion_ids)
    assert (row.source, row.mode) == ("pairs.jsonl:2", "thinking")


def test_a_text_never_ends_in_a_row_of_one_token(chat: Chat) -> None:
    for size in range(1, 60):
        data = Data(sources=[{"path": "x"}], max_tokens=20)
        rows = make_text_rows(Document("x" * size, Path("t"), 1), chat, data, Notes())
        sizes = [len(row.completion_ids) for row in rows]
        assert sum(sizes) == size + 1
        assert 1 < min(sizes) <= max(sizes) <= 20


def test_after_a_prompt_that_is_too_long_the_rest_is_counted_not_rendered(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [m for i in range(30) for m in (ask(f"Question {i}?"), THOUGHT)]
    whole = rows_of(chat, Notes(), *talk, max_tokens=100_000)
    limit = len(whole[9].prompt_ids) + len(whole[9].completion_ids)
    rendered: list[int] = []
    turn = Chat.turn

    def counting(self: Chat, *arguments: Any) -> Any:
        rendered.append(1)
        return turn(self, *arguments)

    monkeypatch.setattr(Chat, "turn", counting)
    notes = Notes()

    rows = rows_of(chat, notes, *talk, max_tokens=limit)

    assert rows == whole[:10]
    assert notes.counts == {"overlong": 20}
    assert len(rendered) <= 13


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning": "", "reasoning_content": "Why."},
        {"reasoning": None, "reasoning_content": "Why."},
        {"reasoning_details": [{"type": "reasoning.text", "text": " "}], "reasoning": "Why."},
        {"reasoning": "", "content": "<think>Why.</think>2"},
        {"content": "<think>\n\n</think>\n\n<think>Why.</think>2"},
    ],
)
def test_blank_reasoning_hides_no_other(chat: Chat, fields: dict[str, Any]) -> None:
    message = DIRECT | fields

    assert rows_of(chat, Notes(), USER, message) == rows_of(
        chat, Notes(), USER, answer("2", "Why.")
    )
    assert rows_of(chat, Notes(), USER, message, thinking="never") == rows_of(
        chat, Notes(), USER, DIRECT
    )


def test_answers_that_follow_one_another_are_told_to_be_merged(chat: Chat) -> None:
    with pytest.raises(DataError, match=r"^chats.jsonl:7: message 2: .*; merge the answers"):
        rows_of(chat, Notes(), USER, DIRECT, DIRECT)


def test_a_pair_that_is_none_is_refused_or_left_out(chat: Chat) -> None:
    data, notes = Data(sources=[{"path": "x"}]), Notes()
    two = Pair((USER,), (), (DIRECT, USER, DIRECT), (DIRECT,), Path("pairs.jsonl"), 2)

    with pytest.raises(DataError, match=r"^pairs.jsonl:2: .* both have reasoning, or neither$"):
        make_pair_rows(pair(THOUGHT, answer("3")), chat, data, notes)
    with pytest.raises(DataError, match=r"^pairs.jsonl:2: .* must be one assistant message each$"):
        make_pair_rows(two, chat, data, notes)
    thinking = data.model_copy(update={"thinking": "always"})
    assert make_pair_rows(pair(DIRECT, answer("3")), chat, thinking, notes) == []
    short = data.model_copy(update={"max_tokens": 9})
    assert make_pair_rows(pair(DIRECT, answer("3")), chat, short, notes) == []
    assert notes.counts == {"without_reasoning": 1, "overlong": 1}


def test_a_control_token_that_is_not_the_templates_own_is_refused(
    chat_folder: Path, tmp_path: Path
) -> None:
    """A tokenizer that makes a control token of ordinary letters, whatever their case."""
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken("the end", normalized=True)])
    tokenizer.save(str(folder / "tokenizer.json"))

    assert rows_of(Chat(folder), Notes(), USER, DIRECT)
    with pytest.raises(DataError) as caught:
        rows_of(Chat(folder), Notes(), ask("The END"), DIRECT)

    assert str(caught.value) == (
        "chats.jsonl:7: message 1: the row holds control tokens that are not the template's own"
    )


@pytest.mark.parametrize("is_chosen_longer", [True, False])
def test_a_pair_is_as_long_as_its_longer_answer(chat: Chat, is_chosen_longer: bool) -> None:
    short, long = DIRECT, answer("2, for one and one are two.")
    chosen, rejected = (long, short) if is_chosen_longer else (short, long)
    (whole,) = rows_of(chat, Notes(), USER, long)
    size = len(whole.prompt_ids) + len(whole.completion_ids)
    fits = Data(sources=[{"path": "x"}], max_tokens=size)
    tight = fits.model_copy(update={"max_tokens": size - 1})
    notes = Notes()

    assert len(make_pair_rows(pair(chosen, rejected), chat, fits, notes)) == 1
    assert not notes.counts
    assert make_pair_rows(pair(chosen, rejected), chat, tight, notes) == []
    assert notes.counts == {"overlong": 1}
    assert f"the row has {size} tokens" in notes.examples["overlong"][0]
    refusing = tight.model_copy(update={"overlong": "refuse"})
    with pytest.raises(DataError, match=rf"^pairs.jsonl:2: .* has {size} tokens, .* {size - 1};"):
        make_pair_rows(pair(chosen, rejected), chat, refusing, notes)


def test_thinking_never_leaves_the_reasoning_of_pairs_out(chat: Chat) -> None:
    data = Data(sources=[{"path": "x"}], thinking="never")
    earlier = (USER, THOUGHT, USER)

    def with_history(chosen: dict[str, Any], rejected: dict[str, Any]) -> Pair:
        return Pair(earlier, (), (chosen,), (rejected,), Path("pairs.jsonl"), 2)

    plain = make_pair_rows(with_history(DIRECT, answer("3")), chat, data, Notes())

    assert [row.mode for row in plain] == ["direct"]
    assert make_pair_rows(with_history(THOUGHT, answer("3", "So?")), chat, data, Notes()) == plain
    assert make_pair_rows(with_history(THOUGHT, answer("3")), chat, data, Notes()) == plain


def test_a_text_that_the_tokenizer_would_change_is_refused(
    chat_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("2", "3")])
    tokenizer.save(str(folder / "tokenizer.json"))
    lossy, data = Chat(folder), Data(sources=[{"path": "x"}])

    (row,) = make_text_rows(Document("cafe\u0301", Path("t.jsonl"), 3), lossy, data, Notes())
    with pytest.raises(DataError, match=r"^t.jsonl:3: the text's ids do not decode to it$"):
        make_text_rows(Document("1+1=2", Path("t.jsonl"), 3), lossy, data, Notes())

    assert lossy.decode(row.completion_ids) == "caf\u00e9<|endoftext|>"
