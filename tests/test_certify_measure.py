"""What a certificate's numbers are: the textbook's, whatever they are computed from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pipeline.certify.greedy import answer, choose_prompts, count_agreed, summarise_greedy
from pipeline.certify.measure import (
    Distances,
    HeldOut,
    choose_rows,
    compare,
    compare_likeliest,
    count_modes,
    logits_of,
    places_by_mode,
    share_positions,
    summarise,
)

ROWS: list[HeldOut] = [
    ([257, 10, 20], [30, 40, 50, 258], "direct"),
    ([257, 11, 21], [31, 258], "direct"),
    ([257, 12], [260, 13, 261, 14, 258], "thinking"),
]
logits = st.lists(
    st.lists(st.floats(-15, 15, width=32), min_size=6, max_size=6), min_size=1, max_size=40
).map(torch.tensor)


def most_likely(candidate: torch.Tensor, count: int) -> list[dict[int, float]]:
    """What an engine answers: the likeliest tokens' log-probabilities."""
    rows = torch.log_softmax(candidate.double(), dim=-1)
    return [
        {int(token): float(row[token]) for token in row.argsort(descending=True)[:count]}
        for row in rows
    ]


def moved(reference: torch.Tensor, random: Any) -> torch.Tensor:
    return reference + torch.tensor([[random.uniform(-3, 3) for _ in range(6)]])


@given(logits)
def test_a_model_does_not_diverge_from_itself(reference: torch.Tensor) -> None:
    same = compare(reference, reference.clone(), [0] * len(reference))
    assert (float(same.kl.sum()), float(same.largest.max())) == (0, 0)
    assert torch.equal(same.surprise, same.usual)
    assert len(same.same) == same.same.sum() == len(reference)


@given(logits, st.randoms(), st.integers(1, 6))
def test_likeliest_tokens_alone_bound_the_divergence_from_below(
    reference: torch.Tensor, random: Any, count: int
) -> None:
    candidate, own = moved(reference, random), [1] * len(reference)
    full = compare(reference, candidate, own)
    part = compare_likeliest(reference, most_likely(candidate, count), own)
    assert bool((part.kl <= full.kl + 1e-9).all())
    assert bool((part.surprise <= full.surprise + 1e-9).all())


@given(logits, st.randoms())
def test_all_tokens_give_the_whole_distance(reference: torch.Tensor, random: Any) -> None:
    candidate, own = moved(reference, random), [2] * len(reference)
    full = compare(reference, candidate, own)
    part = compare_likeliest(reference, most_likely(candidate, 6), own)
    for name in ("kl", "surprise", "usual"):
        expected = getattr(full, name)
        torch.testing.assert_close(getattr(part, name), expected, rtol=1e-6, atol=1e-9)


def test_every_number_is_that_of_the_textbook() -> None:
    reference = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]))
    candidate = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]))
    one = 0.25 * torch.log(torch.tensor(2.0)).item()  # 0.5 ln 2 - 0.25 ln 2
    found = summarise(compare(reference, candidate, [0, 1]), torch.tensor([3 * one, one]))
    assert found["positions"] == 2
    assert found["max_kl"] == pytest.approx(one, rel=1e-6)
    assert found["mean_kl"] == pytest.approx(one / 2, rel=1e-6)
    assert found["effect"] == pytest.approx(0.75, rel=1e-6)
    assert found["top1_agreement"] == 0.5
    assert found["max_logit_difference"] == pytest.approx(0.6931, rel=1e-3)
    assert found["perplexity"] == pytest.approx((0.25 * 0.1) ** -0.5, rel=1e-6)
    assert found["trained_perplexity"] == pytest.approx((0.5 * 0.1) ** -0.5, rel=1e-6)


def test_without_anything_learnt_there_is_no_effect() -> None:
    nothing = torch.zeros(2, dtype=torch.float64)
    found = Distances(nothing, nothing + 1, nothing, nothing, nothing)
    assert summarise(found, nothing)["effect"] is None
    with pytest.raises(AssertionError):
        summarise(found, nothing[:1])


def test_a_divergence_that_is_no_number_stays_one() -> None:
    broken = torch.tensor([[float("nan"), 0.0, 0.0]])
    assert compare(torch.zeros(1, 3), broken, [0]).kl.isnan().all()


def test_rows_are_whole_ones_with_the_modes_in_turn() -> None:
    direct, second, thinking = ROWS
    assert choose_rows(ROWS, 100) == [direct, thinking, second]
    prompt, completion, mode = thinking
    assert choose_rows(ROWS, 8) == [direct, (prompt, completion[:4], mode)]
    assert count_modes(choose_rows(ROWS, 8)) == {"direct": 4, "thinking": 4}


counts = st.lists(st.tuples(st.sampled_from(["direct", "thinking", "text"]), st.integers(1, 9)))


@given(counts, st.integers(0, 60))
def test_each_mode_gets_its_share_however_long_its_rows_are(
    lengths: list[tuple[Any, int]], most: int
) -> None:
    rows: list[HeldOut] = [([1], [2] * length, mode) for mode, length in lengths]
    taken = share_positions(rows, most)
    there, shares = count_modes(rows), dict.fromkeys(count_modes(rows), 0)
    for size, (mode, length) in zip(taken, lengths, strict=True):
        assert 0 <= size <= length
        shares[mode] += size
    assert sum(taken) == min(most, sum(there.values())), "as many as there are"
    for mode, share in shares.items():
        assert share == there[mode] or share + 1 >= max(shares.values())
        own = [
            (size, length) for size, (m, length) in zip(taken, lengths, strict=True) if m == mode
        ]
        cut = [size < length for size, length in own]
        assert cut == sorted(cut), "the first rows are whole"


def test_positions_are_told_apart_by_mode() -> None:
    places = places_by_mode(ROWS)
    assert {mode: which.nonzero().flatten().tolist() for mode, which in places.items()} == {
        "direct": [0, 1, 2, 3, 4, 5],
        "thinking": [6, 7, 8, 9, 10],
    }
    numbers = torch.arange(11, dtype=torch.float64)
    found = Distances(numbers, numbers + 1, numbers, numbers, numbers).at(places["thinking"])
    assert (found.kl.tolist(), found.same.tolist()) == ([6, 7, 8, 9, 10], [7, 8, 9, 10, 11])


def test_the_first_token_of_a_text_is_its_prompt() -> None:
    assert choose_rows([([], [5, 6, 7], "text"), ([], [9], "text")], 2) == [([5], [6, 7], "text")]
    assert choose_rows([([], [5, 6, 7], "text")], 1) == [([5], [6], "text")]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


def test_logits_are_those_of_each_position_run_alone(model: Any) -> None:
    for prompt, completion, mode in ROWS:
        found = logits_of(model, (prompt, completion, mode))
        with torch.no_grad():
            alone = [
                model(torch.tensor([prompt + completion[:size]])).logits[0, -1]
                for size in range(len(completion))
            ]
        torch.testing.assert_close(found, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_answers_are_greedy_and_end_where_the_turn_ends(model: Any) -> None:
    alone = []
    for prompt, _, _ in ROWS:  # of different lengths
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        alone.append(ids[len(prompt) :])
    expected = [(row[0], ids, row[2]) for row, ids in zip(ROWS, alone, strict=True)]
    assert answer(model, ROWS, 6) == expected
    assert answer(model, [], 6) == []

    end = alone[2][1]
    model.generation_config.eos_token_id = end
    try:
        found = answer(model, ROWS, 6)
    finally:
        model.generation_config.eos_token_id = 258
    for (_, ids, _), usual in zip(found, alone, strict=True):
        assert ids == (usual[: usual.index(end) + 1] if end in usual else usual)
    assert len(found[2][1]) < 6


def test_agreement_is_counted_until_an_answer_differs(model: Any) -> None:
    (same,) = answer(model, ROWS[:1], 6)
    prompt, ids, mode = same
    other = (prompt, [*ids[:2], (ids[2] + 1) % 256, *ids[3:]], mode)
    assert (count_agreed(model, same), count_agreed(model, other)) == (6, 2)
    assert summarise_greedy([6, 2], [same, other]) == {
        "greedy_answers": 2,
        "greedy_same": 0.5,
        "greedy_prefix": pytest.approx(2 / 3),
    }
    assert summarise_greedy([], []) == {}


def test_prompts_to_answer_are_different_ones_of_both_modes() -> None:
    again: HeldOut = (ROWS[0][0], [99], "direct")
    text: HeldOut = ([], [5, 6], "text")
    rows = [ROWS[0], again, text, *ROWS[1:]]
    prompts = [row[0] for row in choose_prompts(rows, 3)]
    assert prompts == [ROWS[0][0], ROWS[2][0], ROWS[1][0]]
    assert [row[2] for row in choose_prompts(rows, 2)] == ["direct", "thinking"]
    assert choose_prompts(rows, 0) == []
