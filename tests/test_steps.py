"""Steps: which rows each learns from, and how they lie in micro-batches and on processes."""

from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from pipeline.plan import read_job
from pipeline.plan.machine import this_machine
from pipeline.recipe import Train
from pipeline.train.steps import Steps, group_conversations, plan_steps
from pipeline.tree import IGNORED, TreeRow

sizes = st.lists(st.integers(1, 6), min_size=1, max_size=12)
batches = st.integers(1, 20)
seeds = st.integers(0, 3)

PROMPTS = ([], [1], [1, 2], [1, 2, 3, 4, 5], [1] * 20, [1] * 20 + [2, 3], [4] * 18)
COMPLETIONS = ([9], [8, 9], [7] * 6)
tree_rows = st.lists(
    st.tuples(st.sampled_from(PROMPTS), st.sampled_from(COMPLETIONS)), min_size=1, max_size=9
)


def conversations_of(sizes: list[int]) -> list[list[int]]:
    """Conversations of some sizes, their rows numbered through."""
    ends = list(accumulate(sizes))
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def flat(plan: list[list[int]]) -> list[int]:
    return [row for step in plan for row in step]


@given(sizes, batches, seeds, st.integers(1, 3))
def test_every_epoch_holds_every_row_once(
    sizes: list[int], batch_rows: int, seed: int, epochs: int
) -> None:
    settings = Train(batch_rows=batch_rows, seed=seed, epochs=epochs)
    order = flat(plan_steps(conversations_of(sizes), settings))
    num_rows = sum(sizes)

    assert len(order) == epochs * num_rows
    for start in range(0, len(order), num_rows):
        assert sorted(order[start : start + num_rows]) == list(range(num_rows))


@given(sizes, batches, seeds)
def test_a_conversations_rows_follow_each_other(
    sizes: list[int], batch_rows: int, seed: int
) -> None:
    conversations = conversations_of(sizes)
    order = flat(plan_steps(conversations, Train(batch_rows=batch_rows, seed=seed)))

    for rows in conversations:
        start = order.index(rows[0])
        assert order[start : start + len(rows)] == rows


@given(sizes, batches, st.floats(0.01, 3))
def test_every_step_but_the_last_is_full(sizes: list[int], batch_rows: int, epochs: float) -> None:
    plan = plan_steps(conversations_of(sizes), Train(batch_rows=batch_rows, epochs=epochs))

    assert all(len(step) == batch_rows for step in plan[:-1])
    assert 1 <= len(plan[-1]) <= batch_rows
    assert len(flat(plan)) == max(1, round(epochs * sum(sizes)))


@given(sizes, batches, seeds, st.floats(0.1, 2))
def test_fewer_epochs_are_the_beginning_of_more(
    sizes: list[int], batch_rows: int, seed: int, epochs: float
) -> None:
    few, many = (
        flat(plan_steps(conversations_of(sizes), Train(batch_rows=batch_rows, seed=seed, epochs=e)))
        for e in (epochs, 3)
    )
    assert many[: len(few)] == few


@given(sizes, batches, st.integers(1, 9))
def test_steps_are_as_many_as_asked_and_full(sizes: list[int], batch_rows: int, steps: int) -> None:
    plan = plan_steps(conversations_of(sizes), Train(batch_rows=batch_rows, steps=steps))

    assert [len(step) for step in plan] == [batch_rows] * steps


@given(sizes, batches, seeds, st.sampled_from([1, 64, 10_000]))
def test_the_packing_has_no_say_in_the_plan_and_the_same_seed_makes_the_same(
    sizes: list[int], batch_rows: int, seed: int, micro_tokens: int
) -> None:
    plans = [
        plan_steps(
            conversations_of(sizes),
            Train(batch_rows=batch_rows, seed=seed, packing=packing, micro_tokens=micro_tokens),
        )
        for packing in ("tree", "none")
    ]
    first = plan_steps(conversations_of(sizes), Train(batch_rows=batch_rows, seed=seed))

    assert plans == [first, first]


def test_another_seed_and_another_epoch_are_other_orders() -> None:
    conversations = conversations_of([2] * 20)
    orders = [
        flat(plan_steps(conversations, Train(seed=seed, epochs=2, batch_rows=7))) for seed in (1, 2)
    ]
    epochs = [order[start : start + 40] for order in orders for start in (0, 40)]

    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(40)) not in epochs


def test_more_rows_a_step_than_there_are_is_one_step_an_epoch_spills_into() -> None:
    conversations = conversations_of([3, 2])
    once = plan_steps(conversations, Train(batch_rows=100))
    twice = plan_steps(conversations, Train(batch_rows=100, epochs=2))

    assert [sorted(step) for step in once] == [[0, 1, 2, 3, 4]]
    assert [Counter(step) for step in twice] == [Counter([0, 1, 2, 3, 4] * 2)]


@given(st.integers(1, 60), batches, st.none() | st.floats(0.01, 3), st.none() | st.integers(1, 9))
def test_there_are_as_many_steps_as_predicted(
    tiny_base: Path, num_rows: int, batch_rows: int, epochs: float | None, steps: int | None
) -> None:
    settings = Train(batch_rows=batch_rows, epochs=None if steps else epochs, steps=steps)
    plan = plan_steps([[row] for row in range(num_rows)], settings)
    counts = {"rows": num_rows, "prompt_tokens": 9, "supervised_tokens": 9, "longest_row": 9}

    job = read_job(settings, tiny_base, {"train": counts}, this_machine())

    assert job.num_steps == len(plan)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 3)), max_size=6))
def test_rows_of_one_conversation_are_a_group_and_a_copy_of_it_another(
    written: list[tuple[int, int, int]],
) -> None:
    """As the data stage writes them: one conversation after the other, each with its copies."""
    places = [
        (f"file:{line}", first + 2 * turn)
        for line, (first, num_turns, num_copies) in enumerate(written)
        for _ in range(num_copies)
        for turn in range(num_turns)
    ]
    sizes = [num_turns for _, num_turns, num_copies in written for _ in range(num_copies)]

    assert group_conversations(places) == conversations_of(sizes)


def test_the_rows_of_a_text_that_was_cut_go_their_own_ways() -> None:
    assert group_conversations([("a", 0), ("a", 0), ("b", 0)]) == [[0], [1], [2]]


def test_no_places_are_no_groups() -> None:
    assert group_conversations([]) == []


def make_steps(rows: list[TreeRow], **values: Any) -> Steps:
    """The collator of a training whose first step has all rows, its second the first row."""
    dataset = Dataset.from_dict(
        {"prompt_ids": [row[0] for row in rows], "completion_ids": [row[1] for row in rows]}
    )
    chosen = {"packing": "tree", "micro_tokens": 64} | values
    return Steps(dataset, [list(range(len(rows))), [0]], **chosen)


def collate(steps: Steps, share: int) -> dict[str, Any]:
    return steps([{"share": share}])


def ids_of(pack: dict[str, torch.Tensor]) -> list[int]:
    return [int(value) for value in pack["input_ids"][0]]


def supervised_in(packs: list[dict[str, torch.Tensor]]) -> int:
    return sum(int((pack["labels"] != IGNORED).sum()) for pack in packs)


packings = st.sampled_from(["tree", "none"])
budgets = st.integers(1, 90)


@given(tree_rows, packings, budgets)
def test_the_counts_of_a_step_add_up(rows: list[TreeRow], packing: str, budget: int) -> None:
    step = collate(make_steps(rows, packing=packing, micro_tokens=budget), 0)

    num_tokens = sum(pack["input_ids"].numel() for pack in step["packs"])
    num_row_tokens = sum(len(prompt) + len(completion) for prompt, completion in rows)
    assert step["num_tokens"] == num_tokens
    assert step["num_row_tokens"] == num_row_tokens
    assert step["num_supervised"] == supervised_in(step["packs"])
    assert step["num_supervised"] == sum(len(done) - (not prompt) for prompt, done in rows)
    assert num_tokens <= num_row_tokens if packing == "tree" else num_tokens == num_row_tokens


@given(tree_rows, packings, budgets)
def test_a_packs_tensors_are_batches_of_one(rows: list[TreeRow], packing: str, budget: int) -> None:
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    for pack in collate(make_steps(rows, packing=packing, micro_tokens=budget), 0)["packs"]:
        assert set(pack) == {"input_ids", "labels", "position_ids", "ends"}
        size = pack["input_ids"].shape[1]
        assert size <= max(budget, longest)
        assert all(values.shape == (1, size) for values in pack.values())
        assert all(values.dtype == torch.int64 for values in pack.values())


@given(tree_rows, budgets)
def test_without_packing_rows_lie_side_by_side_unshared(rows: list[TreeRow], budget: int) -> None:
    packs = collate(make_steps(rows, packing="none", micro_tokens=budget), 0)["packs"]

    starts = [
        [at for at, position in enumerate(pack["position_ids"][0]) if position == 0]
        for pack in packs
    ]
    assert sum(map(len, starts)) == len(rows)
    for pack, found in zip(packs, starts, strict=True):
        ends = [*found[1:], pack["input_ids"].numel()]
        spans = zip(found, ends, strict=True)
        assert pack["ends"][0].tolist() == [end for start, end in spans for _ in range(start, end)]


def test_a_step_has_its_own_rows_alone() -> None:
    steps = make_steps([([1, 2], [3]), ([4, 5], [6])])

    assert [ids_of(pack) for pack in collate(steps, 0)["packs"]] == [[1, 2, 3, 4, 5, 6]]
    assert [ids_of(pack) for pack in collate(steps, 1)["packs"]] == [[1, 2, 3]]


def test_two_steps_at_once_are_refused() -> None:
    steps = make_steps([([1, 2], [3])])
    with pytest.raises(ValueError, match="too many values"):
        steps([{"share": 0}, {"share": 1}])


@given(tree_rows, packings, budgets, st.integers(2, 4))
def test_the_processes_shares_of_a_step_are_its_packs_and_as_many_for_each(
    rows: list[TreeRow], packing: str, budget: int, num_processes: int
) -> None:
    values = {"packing": packing, "micro_tokens": budget}
    whole = collate(make_steps(rows, **values), 0)
    split = make_steps(rows, **values, num_processes=num_processes)
    shares = [collate(split, rank) for rank in range(num_processes)]

    for share in shares:
        assert share.keys() == whole.keys()
        assert all(share[key] == whole[key] for key in share if key != "packs")
    # One more forward pass than the others would leave a process waiting for them for ever.
    assert len({len(share["packs"]) for share in shares}) == 1
    packs = [pack for share in shares for pack in share["packs"]]
    assert supervised_in(packs) == whole["num_supervised"]
    found = Counter(tuple(ids_of(pack)) for pack in packs)
    missing = Counter(tuple(ids_of(pack)) for pack in whole["packs"])
    assert found >= missing
    assert (found - missing).total() == len(packs) - len(whole["packs"]) < num_processes
    assert all(len(pack) == 1 for pack in found - missing)


def test_a_process_reads_its_own_share_of_each_step() -> None:
    """What Steps takes for granted of accelerate: item `step * num_processes + rank` is rank's."""
    for rank in range(2):
        every = BatchSampler(SequentialSampler(range(6)), 1, drop_last=False)
        assert list(BatchSamplerShard(every, 2, rank)) == [[rank], [2 + rank], [4 + rank]]


def test_a_step_that_only_has_a_text_of_one_token_teaches_nothing() -> None:
    steps = make_steps([([], [5])], num_processes=2)
    for rank in range(2):
        share = collate(steps, rank)
        assert share["num_supervised"] == 0
        assert [ids_of(pack) for pack in share["packs"]] == [[5]]
