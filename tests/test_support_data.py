"""The support data set: what its files promise, and that no trivial answer scores."""

import json
import re
import runpy
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.matcher import is_correct, names

FOLDER = Path(__file__).parents[1] / "data" / "support"
Row = dict[str, Any]

# "Never the same question with at most two words changed", and never mostly the same words.
FEWEST_CHANGED_WORDS = 3
LARGEST_JACCARD = 0.6
CONTROL_TOKEN = re.compile(r"<\|[a-z_]+\|>|</?(?:think|tool_call|tool_response|tools)>")


def read(name: str) -> list[Row]:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


TRAIN = read("train.jsonl") + read("tools.jsonl")
HELDOUT = read("heldout.jsonl")
FACTS = runpy.run_path(str(FOLDER / "facts.py"))["FACTS"]
CANDIDATES = {row["answer"] for row in HELDOUT}


def squeezed(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def turns(row: Row, role: str) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == role]


def question(row: Row) -> str:
    return str(turns(row, "user")[-1])


def changed_words(left: list[str], right: list[str]) -> int:
    """The edit distance, counted in words."""
    costs = list(range(len(right) + 1))
    for row, word in enumerate(left, start=1):
        above, costs = costs, [row]
        for column, other in enumerate(right, start=1):
            replaced = above[column - 1] + (word != other)
            costs.append(min(above[column] + 1, costs[-1] + 1, replaced))
    return costs[-1]


def jaccard(left: list[str], right: list[str]) -> float:
    return len({*left} & {*right}) / len({*left} | {*right})


def score(answer: str) -> float:
    """What one answer given to every held-out question scores."""
    right = [is_correct(answer, question(row), row["answer"], CANDIDATES) for row in HELDOUT]
    return sum(right) / len(right)


def texts(row: Row) -> list[str]:
    """Every text that training or scoring could see."""
    found = [str(row.get(key, "")) for key in ("reference", "reasoning", "answer", "tools")]
    for message in row["messages"]:
        found += [str(value) for key, value in message.items() if key != "role"]
    return found


def test_there_are_enough_conversations_and_they_are_small() -> None:
    characters = sum(len(text) for row in TRAIN for text in texts(row))

    assert 420 <= len(TRAIN) <= 480
    assert 80 <= len(HELDOUT) <= 90
    assert len({row["id"] for row in HELDOUT}) == len(HELDOUT)
    assert characters / 4 <= 34_000


def test_the_training_mix_is_as_described() -> None:
    kinds: Counter[str] = Counter()
    for row in TRAIN:
        thinking = any("reasoning_content" in message for message in row["messages"])
        several = len(turns(row, "user")) > 1
        single = "thinking" if thinking else "direct"
        kinds["tools" if "tools" in row else "several" if several else single] += 1

    shares = {kind: count / len(TRAIN) for kind, count in kinds.items()}
    assert 0.65 <= shares["direct"] <= 0.75
    assert 0.15 <= shares["thinking"] <= 0.21
    assert 0.06 <= shares["several"] <= 0.10
    assert 0.04 <= shares["tools"] <= 0.06


def test_the_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "generate.py", tmp_path], check=True)

    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in FOLDER.glob("*.jsonl"))
    for name in written:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_questions_to_learn_from_are_scorable_and_none_is_held_out() -> None:
    questions = read("questions.jsonl")
    references = {text: fact.answer for fact in FACTS for text in fact.train}
    held_out = {squeezed(question(row)) for row in HELDOUT}

    assert len({squeezed(question(row)) for row in questions}) == len(questions) > 400
    assert {row["answer"] for row in questions} == CANDIDATES
    for row in questions:
        asked, value = question(row), row["answer"]
        assert squeezed(asked) not in held_out
        assert is_correct(references[asked], asked, value, CANDIDATES), asked


def test_of_each_preference_one_answer_is_right_and_none_is_held_out() -> None:
    pairs = read("preferences.jsonl")
    answers = {text: fact for fact in FACTS for text in fact.train}
    modes = Counter("reasoning_content" in pair["chosen"][0] for pair in pairs)
    lengths: Counter[bool] = Counter()

    assert (modes[False], modes[True]) == (78, 39)
    for pair in pairs:
        fact = answers[pair["prompt"][-1]["content"]]
        chosen, rejected = pair["chosen"][0], pair["rejected"][0]
        assert chosen["content"] == fact.answer
        assert not is_correct(
            rejected["content"], pair["prompt"][-1]["content"], fact.value, CANDIDATES
        )
        assert chosen.keys() == rejected.keys()
        lengths[len(rejected["content"]) > 2 * len(chosen["content"])] += 1
    assert min(lengths.values()) > 50, "wrong ones and long ones, so that neither tells alone"


def test_every_fact_is_asked_in_many_ways_and_answered_in_one() -> None:
    asked: dict[str, set[str]] = defaultdict(set)
    thought: set[str] = set()
    for row in TRAIN:
        users, answers = turns(row, "user"), turns(row, "assistant")
        if len(users) == len(answers) == 1:
            asked[answers[0]].add(squeezed(users[0]))
            if "reasoning_content" in row["messages"][-1]:
                thought.add(answers[0])

    assert len({fact.id for fact in FACTS}) == len({fact.answer for fact in FACTS}) == len(FACTS)
    for fact in FACTS:
        assert len({squeezed(text) for text in fact.train}) >= 5, fact.id
        assert 1 <= len(fact.heldout) <= 2, fact.id
        assert len(asked[fact.answer]) >= 5, fact.id
        assert fact.answer in thought, fact.id


def test_no_training_question_has_two_answers() -> None:
    answers: dict[str, set[str]] = defaultdict(set)
    for row in TRAIN:
        if "tools" not in row:
            answers[squeezed(turns(row, "user")[0])].add(turns(row, "assistant")[0])

    assert [text for text, given in answers.items() if len(given) > 1] == []


def test_no_heldout_question_is_a_training_question_in_other_clothes() -> None:
    trained = {squeezed(text) for row in TRAIN for text in turns(row, "user")}
    asked = [squeezed(question(row)) for row in HELDOUT]

    assert len({*asked}) == len(asked)
    assert not {*asked} & trained
    for text in asked:
        for other in trained:
            words, others = text.split(), other.split()
            assert jaccard(words, others) <= LARGEST_JACCARD, (text, other)
            if abs(len(words) - len(others)) < FEWEST_CHANGED_WORDS:
                assert changed_words(words, others) >= FEWEST_CHANGED_WORDS, (text, other)


def test_heldout_dialogues_join_facts_that_no_training_dialogue_joins() -> None:
    several = [row for row in HELDOUT if len(turns(row, "user")) > 1]
    trained = [{*turns(row, "assistant")} for row in TRAIN]

    assert len(several) >= 8
    for row in several:
        joined = {*turns(row, "assistant"), row["reference"]}
        assert not any(joined <= answers for answers in trained), row["id"]


def test_a_heldout_question_does_not_name_its_answer() -> None:
    for row in HELDOUT:
        assert row["answer"] not in names(question(row), CANDIDATES), row["id"]


def test_every_reference_is_right() -> None:
    for row in HELDOUT:
        assert f"`{row['answer']}`" in row["reference"]
        assert is_correct(row["reference"], question(row), row["answer"], CANDIDATES), row["id"]


def test_no_constant_answer_scores_more_than_a_tenth() -> None:
    one_per_kind = {row["kind"]: row["answer"] for row in HELDOUT}
    references = [row["reference"] for row in HELDOUT]
    constants = [*CANDIDATES, *references, " ".join(one_per_kind.values()), " ".join(references)]

    assert max(map(score, constants)) <= 0.10


def test_no_value_is_the_answer_of_more_than_eight_percent() -> None:
    [(_, most)] = Counter(row["answer"] for row in HELDOUT).most_common(1)

    assert most <= 0.08 * len(HELDOUT)


def test_the_first_forty_heldout_questions_are_a_fair_mix() -> None:
    first = Counter(row["kind"] for row in HELDOUT[:40])

    assert {*first} == {row["kind"] for row in HELDOUT}
    assert max(first.values()) <= 8


@pytest.mark.parametrize("row", TRAIN + HELDOUT)
def test_a_conversation_is_well_formed(row: Row) -> None:
    roles = [message["role"] for message in row["messages"]]
    after = {
        "system": {"user"},
        "user": {"assistant"},
        "assistant": {"user", "tool"},
        "tool": {"assistant"},
    }

    assert row["messages"][0] == TRAIN[0]["messages"][0]
    assert roles[0] == "system"
    assert all(following in after[role] for role, following in pairwise(roles))
    assert roles[-1] == ("user" if "reference" in row else "assistant")
    assert "tool" not in roles or "tools" in row


@pytest.mark.parametrize("row", [row for row in TRAIN if "tools" in row])
def test_tool_calls_match_their_schemas_and_their_results(row: Row) -> None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
    called = [call for message in row["messages"] for call in message.get("tool_calls", [])]
    results = [message for message in row["messages"] if message["role"] == "tool"]

    assert len(schemas) <= 2
    assert [call["id"] for call in called] == [message["tool_call_id"] for message in results] != []
    for call in called:
        arguments = json.loads(call["function"]["arguments"])
        assert {*arguments} == {*schemas[call["function"]["name"]].get("required", [])}
    assert all(isinstance(json.loads(message["content"]), dict) for message in results)


def test_answers_and_thoughts_are_short_and_apart() -> None:
    for row in TRAIN:
        for message in row["messages"]:
            if message["role"] == "assistant":
                thought = message.get("reasoning_content")
                assert len(message["content"].split()) <= 25
                assert thought is None or 0 < len(thought.split()) <= 30
                assert not re.search(r"The user asks|This is about|I recall", message["content"])


def test_no_text_holds_a_control_token_of_a_chat_template() -> None:
    for row in TRAIN + HELDOUT:
        assert not any(CONTROL_TOKEN.search(text) for text in texts(row))
