"""Duplicates: what is alike is found whatever its order and spelling, and nothing else."""

import datetime
import random
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import duplicates
from pipeline.data.conversation import Conversation, Document, Pair, Sample
from pipeline.data.duplicates import ALIKE, Duplicates, Fingerprint, fingerprint

NOTHING = {"exact": 0, "near": 0, "examples": []}
WORDS = ["".join(random.Random(n).choices("abcdefghijklmno", k=2 + n % 8)) for n in range(400)]


def say(*texts: str, line: int = 1, system: str = "", **more: Any) -> Conversation:
    """User and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    for number, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[number % 2], "content": text, **more})
    return Conversation(tuple(messages), (), Path("chats.jsonl"), line)


def is_alike(first: Sample, second: Sample) -> bool:
    """What the signatures alone say."""
    signatures = [np.frombuffer(fingerprint(s, False).near, "<u4") for s in (first, second)]
    return bool((signatures[0] == signatures[1]).mean() >= ALIKE)


def find(folder: Path, *fingerprints: Fingerprint) -> tuple[dict[str, Any], dict[str, Any]]:
    with Duplicates(folder) as found:
        for one in fingerprints:
            found.add(one)
        return found.find()


def place(number: int, exact: int, near: bytes, held: bool = False) -> Fingerprint:
    return Fingerprint(f"{'eval' if held else 'train'}.jsonl:{number}", exact, near, held)


def signature(number: int, changed: int = 0) -> bytes:
    """A random signature, of which so many hashes were then replaced."""
    hashes = np.random.default_rng(number).integers(0, 2**32, 64, dtype="<u4")
    if changed:
        chosen = np.random.default_rng([number, changed]).permutation(64)[:changed]
        hashes[chosen] += np.arange(1, changed + 1, dtype="<u4")
    return hashes.tobytes()


@cache
def shingles(text: str) -> set[str]:
    text = "\0" * 7 + " ".join(text.lower().split()) + "\0" * 7
    return {text[start : start + 8] for start in range(len(text) - 7)}


def jaccard(first: str, second: str) -> float:
    one, other = shingles(first), shingles(second)
    return len(one & other) / len(one | other)


def test_identifiers_dates_and_spellings_of_the_same_messages_make_exact_duplicates():
    question = {"role": "user", "content": "How are you?"}
    call = {"function": {"name": "look", "arguments": {"a": 1, "b": 2}}}
    spelled = {"function": {"name": "look", "arguments": '{"b": 2, "a": 1}'}}
    plain = {"role": "assistant", "content": "Well.", "reasoning": "Hm.", "tool_calls": [call]}
    other = {
        "role": "assistant",
        "content": [{"type": "text", "text": "<think>Hm.</think>\n\nWell."}],
        "tool_calls": [spelled | {"id": "call_1"}],
        "at": datetime.date(2025, 1, 1),
    }
    exact = {
        fingerprint(Conversation((question, answer), (), Path("a"), 1), False).exact
        for answer in (plain, other)
    }
    assert len(exact) == 1


def test_everything_a_model_sees_or_learns_tells_exact_duplicates_apart():
    question = {"role": "user", "content": "How are you?"}
    answer = {"role": "assistant", "content": "Well."}
    path, tool = Path("a"), {"name": "look"}
    samples = [
        Conversation((question, answer), (), path, 1),
        Conversation((question, answer), (tool,), path, 1),
        Conversation((question, answer | {"train": False}), (), path, 1),
        Conversation((question, answer | {"reasoning": "Hm."}), (), path, 1),
        Conversation(({"role": "system", "content": "Hi"}, question, answer), (), path, 1),
        Conversation((answer, question), (), path, 1),
        Pair((question,), (), (answer,), (), path, 1),
        Pair((question,), (), (), (answer,), path, 1),
        Pair((question,), (tool,), (), (answer,), path, 1),
        Document("How are you? Well.", path, 1),
        Document("how are you? well.", path, 1),
        Document("", path, 1),
    ]
    assert len({fingerprint(sample, False).exact for sample in samples}) == len(samples)


def test_a_fingerprint_knows_its_place_and_part_and_has_64_bits_and_64_hashes():
    one = fingerprint(Document("text", Path("d/a.jsonl"), 7), True)
    assert (one.source, one.held) == ("d/a.jsonl:7", True)
    assert len(one.near) == 256
    whole = [fingerprint(Document(str(n), Path("a"), 1), False).exact for n in range(64)]
    assert all(0 <= exact < 2**64 for exact in whole)
    assert max(whole) >= 2**63


def test_system_messages_tools_case_and_white_space_are_no_matter_to_the_near_signature():
    plain = say("How do I reset it?", "Press the button.")
    loud = say("how do I\n\nRESET it?  ", "\tPress the button.", system="Be brief.")
    tooled = Conversation(plain.messages, ({"name": "look"},), Path("b"), 2)
    signatures = {fingerprint(sample, False).near for sample in (plain, loud, tooled)}
    assert len(signatures) == 1


@pytest.mark.parametrize(
    "more",
    [
        {"role": "user", "content": "And what about the other one?"},
        {"role": "tool", "content": "It rained for all of the week."},
        {"role": "assistant", "content": "", "reasoning": "I should look this up first."},
        {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"where": "Rome"}}]},
    ],
)
def test_what_users_assistants_and_tools_said_is_in_the_near_signature(more):
    plain = say("How do I reset it?", "Press the button.")
    longer = Conversation((*plain.messages, more), (), Path("a"), 1)
    assert fingerprint(plain, False).near != fingerprint(longer, False).near


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("Say 1.", "1"), ("Say 2.", "2")),
        (("Hi", "Hello"), ("Ho", "Hallo")),
        (("a", "b"), ("a", "c")),
        (("How much is 12+30?", "42"), ("How much is 12+31?", "43")),
        (
            ("Please repeat after me the number 1", "1"),
            ("Please repeat after me the number 2", "2"),
        ),
        (("天气怎么样?", "今天晴。"), ("天气怎么样?", "今天雨。")),
    ],
)
def test_short_texts_that_differ_in_a_word_or_number_are_not_alike(first, second):
    assert not is_alike(say(*first), say(*second))
    assert is_alike(say(*first), say(*first, system="You are a parrot."))


def test_texts_without_words_and_with_halves_of_letters_have_signatures():
    blank, empty = Document(" \n", Path("a"), 1), Document("", Path("a"), 2)
    assert is_alike(blank, empty)
    assert not is_alike(empty, Document("a", Path("a"), 3))
    assert not is_alike(Document("\ud83d" * 9, Path("a"), 4), Document("a" * 9, Path("a"), 5))
    assert fingerprint(say("\ud83d", "\udcffé"), False).near


def test_the_estimate_is_the_true_similarity_give_or_take_what_64_hashes_allow():
    errors = []
    for seed in range(300):
        dice = random.Random(seed)
        words = dice.choices(WORDS, k=80)
        changed = [word if dice.random() < 0.9 else dice.choice(WORDS) for word in words]
        texts = [" ".join(words), " ".join(changed)]
        hashes = [fingerprint(Document(text, Path("a"), 1), False).near for text in texts]
        one, other = (np.frombuffer(each, "<u4") for each in hashes)
        errors.append((one == other).mean() - jaccard(*texts))
    assert abs(np.mean(errors)) < 0.015
    assert np.std(errors) < 0.07  # of 64 throws at 0.5: 0.0625


def test_a_long_text_hashed_in_pieces_has_the_signature_of_the_whole(monkeypatch):
    text = " ".join(random.Random(1).choices(WORDS, k=500))
    pieces = []
    for size in (1, 7, 8, 100, 10**6):
        monkeypatch.setattr(duplicates, "_PIECE_CHARACTERS", size)
        pieces.append(fingerprint(Document(text, Path("a"), 1), False).near)
    assert len(set(pieces)) == 1


def test_nothing_added_is_nothing_found(tmp_path):
    assert find(tmp_path) == (NOTHING, NOTHING)
    assert find(tmp_path, place(1, 1, signature(1))) == (NOTHING, NOTHING)


def test_copies_are_counted_within_a_part_and_across_the_parts(tmp_path):
    found = find(
        tmp_path,
        place(1, 7, signature(7)),
        place(2, 8, signature(8)),
        place(3, 7, signature(7)),
        place(4, 7, signature(7)),
        place(1, 7, signature(7), held=True),
        place(2, 7, signature(7), held=True),
        place(3, 9, signature(9), held=True),
    )
    assert found == (
        {
            "exact": 3,
            "near": 0,
            "examples": [
                ["train.jsonl:1", "train.jsonl:3"],
                ["train.jsonl:1", "train.jsonl:4"],
                ["eval.jsonl:1", "eval.jsonl:2"],
            ],
        },
        {"exact": 2, "near": 0, "examples": [["train.jsonl:1", "eval.jsonl:1"]]},
    )


def test_near_duplicates_are_told_from_copies_within_a_part_and_across(tmp_path):
    found = find(
        tmp_path,
        place(1, 1, signature(5)),
        place(2, 2, signature(5, changed=6)),
        place(3, 2, signature(5, changed=6)),
        place(4, 3, signature(6)),
        place(1, 4, signature(6, changed=6), held=True),
        place(2, 4, signature(6, changed=6), held=True),
        place(3, 5, signature(8), held=True),
    )
    assert found == (
        {
            "exact": 2,
            "near": 2,
            "examples": [
                ["train.jsonl:2", "train.jsonl:3"],
                ["eval.jsonl:1", "eval.jsonl:2"],
                ["train.jsonl:1", "train.jsonl:2"],
            ],
        },
        {"exact": 0, "near": 2, "examples": [["train.jsonl:4", "eval.jsonl:1"]]},
    )


def test_signatures_count_as_alike_from_four_fifths_of_their_hashes_on(tmp_path):
    for changed, near in ((12, 2), (13, 0)):
        one, other = place(1, 1, signature(5)), place(2, 2, signature(5, changed=changed))
        assert find(tmp_path, one, other)[0]["near"] == near


def test_a_held_out_conversation_finds_its_like_in_training_among_many_held_out_ones(tmp_path):
    crowd = [place(n, 100 + n, signature(5), held=True) for n in range(50)]
    duplicates, overlap = find(tmp_path, *crowd, place(1, 1, signature(5, changed=3)))
    assert duplicates["near"] == 50
    assert overlap["near"] == 50


def test_no_more_than_ten_examples_are_given(tmp_path):
    many = [
        place(n, n // 2, signature(n // 4), held=held) for held in (False, True) for n in range(100)
    ]
    duplicates, overlap = find(tmp_path, *many)
    assert (duplicates["exact"], duplicates["near"], overlap["exact"]) == (100, 100, 100)
    assert len(duplicates["examples"]) == 10
    assert len(overlap["examples"]) == 5  # all of them are exact


def test_places_with_strange_names_come_back_whole(tmp_path):
    near = signature(1)
    strange = [Fingerprint(f"{name}:1", 1, near, False) for name in ("ä b", "\udcff")]
    assert find(tmp_path, *strange)[0]["examples"] == [["ä b:1", "\udcff:1"]]


def test_nothing_is_left_in_the_folder(tmp_path):
    find(tmp_path, *(place(n, 1, signature(1)) for n in range(3)))
    with Duplicates(tmp_path) as found:
        found.add(place(1, 1, signature(1)))
    assert not list(tmp_path.iterdir())


# A few contents and a few signatures each, so that all that may coincide does.
few = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 1), st.booleans()), max_size=30
)


def numbered(drawn: list[tuple[int, int, int, bool]]) -> list[Fingerprint]:
    """Like content has a like signature, as it must."""
    return [
        place(number, 100 * base + 10 * variant + far, signature(base, variant + 40 * far), held)
        for number, (base, variant, far, held) in enumerate(drawn)
    ]


def alike(one: Fingerprint, other: Fingerprint) -> bool:
    hashes = [np.frombuffer(each.near, "<u4") for each in (one, other)]
    return one.exact != other.exact and bool((hashes[0] == hashes[1]).mean() >= ALIKE)


@given(few, st.randoms(use_true_random=False))
@settings(derandomize=True, max_examples=50)  # a signature is a matter of chance
def test_counts_equal_those_of_comparing_all_with_all_in_any_order(tmp_path_factory, drawn, dice):
    given_ones = numbered(drawn)
    parts = [[one for one in given_ones if one.held is held] for held in (False, True)]
    trained = {one.exact for one in parts[0]}
    distinct = [list({one.exact: one for one in part}.values()) for part in parts]
    near = [one for part in distinct for one in part if any(alike(one, other) for other in part)]
    across = [one for one in parts[1] if one.exact not in trained]
    counts = [
        (len(given_ones) - sum(map(len, distinct)), len(near)),
        (
            sum(one.exact in trained for one in parts[1]),
            sum(any(alike(one, other) for other in parts[0]) for one in across),
        ),
    ]
    for _ in range(2):
        found = find(tmp_path_factory.getbasetemp(), *given_ones)
        assert [(each["exact"], each["near"]) for each in found] == counts
        for each in found:
            assert bool(each["examples"]) is bool(each["exact"] + each["near"])
        dice.shuffle(given_ones)


@pytest.mark.parametrize("seed", range(2))
def test_among_texts_of_one_template_the_nearly_same_are_found_and_the_others_are_not(
    tmp_path, seed
):
    dice = random.Random(seed)
    template = dice.choices(WORDS, k=80)
    texts = []
    for number in range(150):
        words = [word if dice.random() < 0.8 else dice.choice(WORDS) for word in template]
        texts += [" ".join(words), " ".join([*words, "x"])][: 1 + (number % 10 == 0)]
    truth = {pair: jaccard(*pair) for pair in combinations(texts, 2)}
    twins = {text for pair, value in truth.items() if value >= 0.95 for text in pair}
    kin = {text for pair, value in truth.items() if value >= 0.6 for text in pair}
    assert len(twins) == len(kin) == 30, "the texts are not what they should be"
    assert max(value for value in truth.values() if value < 0.95) > 0.4, "too easy"
    samples = [fingerprint(Document(t, Path("a"), n), False) for n, t in enumerate(texts)]
    assert find(tmp_path, *samples)[0]["near"] == 30
