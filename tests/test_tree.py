"""Prefix trees: what is laid out is every row once, a shared beginning once, and no more."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.chat import Chat
from pipeline.tree import (
    IGNORED,
    MIN_SHARED,
    Pack,
    TreeRow,
    count_shared,
    count_tree_tokens,
    lay_out,
    pack_rows,
)

ids = st.lists(st.integers(0, 2), max_size=6)
# Few long stems, so that rows share more than MIN_SHARED tokens, or a little less, or nothing.
stems = st.tuples(st.integers(0, 2), st.integers(0, MIN_SHARED + 4)).map(lambda s: [s[0]] * s[1])
prompts = st.builds(list.__add__, stems, ids)
completions = st.lists(st.integers(0, 2), min_size=1, max_size=6)
rows = st.lists(st.tuples(prompts, completions), max_size=10)
budgets = st.integers(1, 80)

Reading = tuple[tuple[int, ...], tuple[int, ...]]
"""The ids and labels of a row."""


def size_of(row: TreeRow) -> int:
    return len(row[0]) + len(row[1])


def seen_from(pack: Pack, query: int) -> list[int]:
    """The places a token sees, in order: design law 2's rule, written out."""
    return [key for key in range(len(pack.ids)) if key <= query < pack.ends[key]]


def last_tokens(pack: Pack) -> list[int]:
    """Where rows end: at the tokens that nobody after them sees."""
    return [place for place, end in enumerate(pack.ends) if end == place + 1]


def read_back(pack: Pack) -> list[Reading]:
    """The rows of a pack, each by what its last token sees."""
    paths = [seen_from(pack, place) for place in last_tokens(pack)]
    return [
        (tuple(pack.ids[at] for at in path), tuple(pack.labels[at] for at in path))
        for path in paths
    ]


def as_read(row: TreeRow) -> Reading:
    """What must be read back of a row: every id, and labels on its completion alone."""
    prompt, completion = row
    whole = [*prompt, *completion]
    start = max(1, len(prompt))  # nothing stands before a plain text's first token
    return tuple(whole), tuple([IGNORED] * start + whole[start:])


def count_trie_tokens(rows: list[TreeRow]) -> int:
    """A trie's nodes are the distinct beginnings; the last prompt token is each row's own."""
    beginnings = {tuple(prompt[:size]) for prompt, _ in rows for size in range(1, len(prompt))}
    return len(beginnings) + sum(len(prompt[-1:]) + len(done) for prompt, done in rows)


@given(rows)
def test_the_count_is_the_size_of_the_trie_of_prompts_and_all_that_follows(
    rows: list[TreeRow],
) -> None:
    assert count_tree_tokens(rows) == count_trie_tokens(rows)


@given(rows, st.randoms(use_true_random=False), budgets)
def test_the_order_of_rows_does_not_matter(
    rows: list[TreeRow], random: Random, budget: int
) -> None:
    shuffled = random.sample(rows, len(rows))

    assert count_tree_tokens(shuffled) == count_tree_tokens(rows)
    assert lay_out(shuffled) == lay_out(rows)
    assert pack_rows(shuffled, budget) == pack_rows(rows, budget)


@given(rows, st.booleans())
def test_every_row_can_be_read_back_with_labels_on_its_completion_alone(
    rows: list[TreeRow], shared: bool
) -> None:
    assert Counter(read_back(lay_out(rows, shared))) == Counter(map(as_read, rows))


@given(rows, st.booleans())
def test_position_ids_count_the_tokens_a_token_sees(rows: list[TreeRow], shared: bool) -> None:
    pack = lay_out(rows, shared)

    for place in last_tokens(pack):
        path = seen_from(pack, place)
        assert [pack.positions[at] for at in path] == list(range(len(path)))
    assert pack.positions == [len(seen_from(pack, at)) - 1 for at in range(len(pack.ids))]


@given(rows)
def test_a_pack_has_the_tokens_of_the_trie_and_none_of_them_twice(rows: list[TreeRow]) -> None:
    pack = lay_out(rows)

    assert len(pack.ids) == count_trie_tokens(rows)
    assert len(pack.ids) == len(pack.labels) == len(pack.positions) == len(pack.ends)


@given(rows)
def test_without_sharing_every_row_has_all_its_tokens_to_itself(rows: list[TreeRow]) -> None:
    pack = lay_out(rows, shared=False)

    assert len(pack.ids) == sum(map(size_of, rows))
    lasts = last_tokens(pack)
    starts = [0, *(place + 1 for place in lasts)][: len(lasts)]
    for start, last in zip(starts, lasts, strict=True):
        assert seen_from(pack, last) == list(range(start, last + 1))


@given(rows, st.booleans())
def test_the_order_is_depth_first(rows: list[TreeRow], shared: bool) -> None:
    """Subtrees lie within each other or apart, and each follows its root without a gap."""
    ends = lay_out(rows, shared).ends

    for at, end in enumerate(ends):
        assert at < end <= len(ends)
        assert all(inner <= end for inner in ends[at:end])


@given(rows)
def test_the_last_prompt_token_and_what_follows_are_a_rows_own(rows: list[TreeRow]) -> None:
    pack = lay_out(rows)
    lasts = last_tokens(pack)

    for last in lasts:
        path = seen_from(pack, last)
        first_label = next((i for i, at in enumerate(path) if pack.labels[at] != IGNORED), None)
        if first_label is None:  # a plain text of one token
            continue
        for place in path[first_label - 1 :]:
            assert [at for at in lasts if place <= at < pack.ends[place]] == [last]


@given(rows)
def test_labels_are_the_tokens_themselves_and_counted(rows: list[TreeRow]) -> None:
    pack = lay_out(rows)

    trained = [at for at, label in enumerate(pack.labels) if label != IGNORED]
    assert all(pack.labels[at] == pack.ids[at] for at in trained)
    assert pack.num_supervised == len(trained)
    assert len(trained) == sum(len(done) - (not prompt) for prompt, done in rows)
    assert 0 not in trained, "nothing predicts a pack's first token"


@given(rows, budgets)
def test_packs_hold_every_row_once(rows: list[TreeRow], budget: int) -> None:
    packs = pack_rows(rows, budget)

    found = [reading for pack in packs for reading in read_back(pack)]
    assert Counter(found) == Counter(map(as_read, rows))
    assert all(pack.ids for pack in packs)


@given(rows, budgets)
def test_a_pack_is_over_the_budget_only_where_one_row_is(rows: list[TreeRow], budget: int) -> None:
    for pack in pack_rows(rows, budget):
        assert len(pack.ids) <= budget or len(last_tokens(pack)) == 1


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 40))
def test_no_two_packs_of_rows_that_share_nothing_would_fit_in_one(
    sizes: list[int], budget: int
) -> None:
    packs = pack_rows([([], [index] * size) for index, size in enumerate(sizes)], budget)

    lengths = sorted(len(pack.ids) for pack in packs)
    assert sum(lengths) == sum(sizes)
    assert len(lengths) < 2 or lengths[0] + lengths[1] > budget


def test_a_tree_goes_where_it_leaves_the_least_room() -> None:
    sizes = (1, 9, 10, 12)  # first fit would put the 1 beside the 12
    packs = pack_rows([([], [size] * size) for size in sizes], 20)

    assert sorted(len(pack.ids) for pack in packs) == [12, 20]


@pytest.mark.parametrize(("num_shared", "num_packs"), [(MIN_SHARED, 1), (MIN_SHARED - 1, 2)])
def test_rows_that_share_little_are_not_held_together(num_shared: int, num_packs: int) -> None:
    stem = [7] * num_shared
    rows: list[TreeRow] = [([*stem, 0, 0], [0] * 9), ([*stem, 1, 1], [1] * 9)]

    # As one tree they fit with nothing to spare; as two, not.
    assert len(pack_rows(rows, num_shared + 22)) == num_packs
    assert len(pack_rows(rows, 2 * num_shared + 22)) == 1


def test_rows_in_one_pack_share_even_the_little_they_have_in_common() -> None:
    rows: list[TreeRow] = [([7, 7, 0, 0], [0]), ([7, 7, 1, 1], [1])]
    (pack,) = pack_rows(rows, 100)

    assert len(pack.ids) == 2 + 3 + 3
    assert pack.ends[:2] == [8, 8]


@pytest.mark.parametrize(("budget", "sizes"), [(63, [52] * 6), (64, [64] * 3), (76, [76] * 2)])
def test_a_tree_over_the_budget_is_cut_into_trees_that_repeat_what_they_share(
    budget: int, sizes: list[int]
) -> None:
    stem = list(range(100, 140))
    rows: list[TreeRow] = [([*stem, turn, turn], [turn] * 10) for turn in range(6)]
    packs = pack_rows(rows, budget)  # the stem, and 12 tokens for each row

    assert [len(pack.ids) for pack in packs] == sizes
    assert all(pack.ids[:40] == stem for pack in packs)
    assert all(end == len(pack.ids) for pack in packs for end in pack.ends[:40])


def test_a_row_that_is_too_long_lies_alone_and_the_others_as_if_it_were_not_there() -> None:
    long, short = ([], [1] * 50), ([], [2] * 5)

    assert pack_rows([short, long, short], 20) == [lay_out([long]), lay_out([short, short])]


def test_no_rows_are_no_packs() -> None:
    assert pack_rows([], 10) == []
    assert lay_out([]) == Pack()


def test_a_conversation_pays_for_its_history_once(chat: Chat) -> None:
    """Three turns through the real template: a prompt but for its ending is in the next one."""
    system = {"role": "system", "content": "You are the assistant of a shop. " * 5}
    talk = [system]
    for question, answer in (("Open?", "Until nine."), ("And today?", "Too."), ("Bye", "Bye.")):
        talk += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, "reasoning": ""},
        ]
    rows = [(turn.prompt_ids, turn.completion_ids) for turn in chat.turns(talk, None)]
    (pack,) = pack_rows(rows, 10_000)

    assert len(rows) == 3
    assert Counter(read_back(pack)) == Counter(map(as_read, rows))
    # The generation prompt at the end of each earlier turn is all that is not in the last one.
    last = rows[-1][0]
    apart = sum(len(prompt) - 1 - count_shared(prompt[:-1], last[:-1]) for prompt, _ in rows[:-1])
    own = sum(1 + len(completion) for _, completion in rows)
    assert len(pack.ids) == len(last) - 1 + apart + own
    assert apart < 2 * 40
    assert len(pack.ids) < 0.6 * sum(map(size_of, rows))
