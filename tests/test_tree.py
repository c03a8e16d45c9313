"""Prefix trees: what rows cost when a shared beginning is paid for once."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from pipeline.tree import count_tree_tokens

ids = st.lists(st.integers(0, 2), max_size=6)
rows = st.lists(st.tuples(ids, ids), max_size=8)


@given(rows)
def test_it_is_the_size_of_the_trie_of_prompts_and_all_that_follows(
    rows: list[tuple[list[int], list[int]]],
) -> None:
    """A trie's nodes are the distinct beginnings; the last prompt token is each row's own."""
    beginnings = {tuple(prompt[:size]) for prompt, _ in rows for size in range(1, len(prompt))}
    own = sum(len(prompt[-1:]) + len(completion) for prompt, completion in rows)

    assert count_tree_tokens(rows) == len(beginnings) + own


@given(rows, st.randoms())
def test_the_order_of_rows_does_not_matter(
    rows: list[tuple[list[int], list[int]]], random: Random
) -> None:
    shuffled = random.sample(rows, len(rows))

    assert count_tree_tokens(shuffled) == count_tree_tokens(rows)
