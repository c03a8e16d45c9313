"""Questions and their scores; the model itself is not needed for either."""

import asyncio
import json
from pathlib import Path

import pytest
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.errors import DataError
from pipeline.evaluate.stage import _ask_all, _score
from pipeline.questions import Question, read_questions

QUESTIONS = [
    Question([{"role": "user", "content": "How many stops at most?"}], "4"),
    Question([{"role": "user", "content": "Which route gives the models?"}], "/models"),
]
CANDIDATES = ["/keys", "/models", "4", "8"]


def scored(texts: list[str], mode: str = "direct") -> dict[str, object]:
    return _score(QUESTIONS[: len(texts)], texts, mode, CANDIDATES)


def test_questions_are_read_in_order(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    rows = [{"messages": q.messages, "answer": q.answer} for q in QUESTIONS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_questions(file) == QUESTIONS
    assert QUESTIONS[0].text == "How many stops at most?"


GOOD = json.dumps({"messages": [{"role": "user", "content": "?"}], "answer": "4"})


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        '{"messages": [{"role": "user", "content": "?"}]}',
        '{"answer": "4"}',
        '{"messages": [], "answer": "4"}',
        '{"messages": ["?"], "answer": "4"}',
        '{"messages": [{"role": "user"}], "answer": "4"}',
        '{"messages": [{"role": "user", "content": "?"}], "answer": 4}',
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(DataError, match=r"questions\.jsonl:2: a question needs `messages` and"):
        read_questions(file)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ('{"content": "?"}', "message 0: role None is none of system, user, assistant, tool"),
        ('{"role": "robot", "content": "?"}', "message 0: role 'robot' is none of"),
        ('{"role": "system", "content": 7}', "message 0: content must be text, not int"),
    ],
)
def test_a_message_that_cannot_be_asked_is_named(tmp_path: Path, message: str, words: str) -> None:
    file = tmp_path / "questions.jsonl"
    last = '{"role": "user", "content": "?"}'
    file.write_text(f'{GOOD}\n{{"messages": [{message}, {last}], "answer": "4"}}\n')
    with pytest.raises(DataError, match=rf"questions\.jsonl:2: {words}"):
        read_questions(file)


def test_blank_lines_are_skipped_and_other_line_breaks_are_text(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    question = Question([{"role": "user", "content": "a\u2028b\u0085c\x1dd"}], "4")
    row = json.dumps({"messages": question.messages, "answer": "4"}, ensure_ascii=False)
    file.write_bytes(f"\n{row}\r\n  \n{row}".encode())
    assert read_questions(file) == [question] * 2


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "questions.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read: questions must be a JSONL file$"):
        read_questions(file)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("")
    with pytest.raises(DataError, match="holds no questions"):
        read_questions(file)


def test_a_question_ends_with_the_users_turn(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    answered = '[{"role": "user", "content": "?"}, {"role": "assistant", "content": "4"}]'
    file.write_text(f'{GOOD}\n{{"messages": {answered}, "answer": "4"}}\n')
    with pytest.raises(DataError, match=r"questions\.jsonl:2: the last message of a question must"):
        read_questions(file)


def test_correct_and_well_formed_are_counted_apart() -> None:
    result = scored(["At most 4.", "<think>\n\n</think>\n\nAsk /models."])
    assert (result["questions"], result["num_correct"]) == (2, 2)
    assert result["correct"] == 1.0
    assert result["well_formed"] == 0.5, "direct mode has no think tag"
    result = scored(["At most 8.", "It is /keys."])
    assert (result["correct"], result["well_formed"]) == (0.0, 1.0)


def test_what_is_only_thought_does_not_count() -> None:
    thought = "<think>\nIs it 4?\n</think>\n\n"
    result = scored([thought + "I do not know.", thought + "Ask /models."], "thinking")
    assert [answer["correct"] for answer in result["answers"]] == [False, True]
    assert result["well_formed"] == 1.0


def test_a_thought_that_never_ends_is_neither_correct_nor_well_formed() -> None:
    result = scored(["<think>\nIt must be 4"], "thinking")
    assert (result["correct"], result["well_formed"]) == (0.0, 0.0)


def test_listing_all_answers_is_no_way_to_pass() -> None:
    assert scored(["", "/models, /keys, 4 or 8"])["correct"] == 0.0


def test_each_answer_is_kept_for_the_reader() -> None:
    [answer] = scored(["4"])["answers"]
    assert answer == {
        "question": "How many stops at most?",
        "expected": "4",
        "text": "4",
        "correct": True,
        "well_formed": True,
    }


def test_no_questions_are_no_division_by_zero() -> None:
    assert scored([]) == {
        "questions": 0,
        "num_correct": 0,
        "correct": 0.0,
        "well_formed": 0.0,
        "answers": [],
    }


@pytest.mark.parametrize("mode", ["direct", "thinking"])
def test_questions_are_asked_greedily_in_their_mode_and_answers_keep_their_order(
    chat: Chat, mode: str
) -> None:
    engine = ScriptedEngine(["4", " stops"])
    texts = asyncio.run(_ask_all(engine, chat, QUESTIONS * 6, mode, 20))
    assert texts == ["4 stops"] * 12
    assert {(s.max_tokens, s.temperature) for _, s in engine.asked} == {(20, 0.0)}
    assert [prompt for prompt, _ in engine.asked] == [
        chat.prompt_ids(question.messages, None, mode) for question in QUESTIONS * 6
    ]
    assert engine.num_open == 0
