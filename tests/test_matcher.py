"""The answer matcher."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.matcher import is_correct, names

VALUES = (
    "1",
    "2",
    "-2",
    "429",
    "1024",
    "max_tokens",
    "max_completion_tokens",
    "/key",
    "/models",
    "/models/count",
    "GET /key",
    "X-OpenRouter-Cache",
    "X-OpenRouter-Cache-TTL",
    "context-compression",
    "text/event-stream",
    "chat.completion",
    "chat.completion.chunk",
    "gen-",
    "[DONE]",
    "false",
)
DECORATIONS = ("{}", "`{}`", "**{}**", "*{}*", "_{}_", "__{}__", '"{}"', "“{}”", "**`{}`**", "({})")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is `max_completion_tokens`.", {"max_completion_tokens"}),
        ("It is 1.5.", set()),
        ("It is 1.", {"1"}),
        ("It is 1.0.", {"1"}),
        ("It is -2.", {"-2"}),
        ("It is \u22122.", {"-2"}),
        ("It goes from -2 to 2.", {"-2", "2"}),
        ("It goes from 1-2.", {"1", "2"}),
        ("It is 2/429.", {"2", "429"}),
        ("It is 1,024 tokens.", {"1024"}),
        ("On 2026-10-2 it changed.", set()),
        ("Use /keys or /auth/key or /key/x.", set()),
        ("Use /key.", {"/key"}),
        ("Use GET `/key`.", {"GET /key"}),
        ("Use /models/count/.", {"/models/count"}),
        ("Use /models/{author}/{slug}.", set()),
        ("Use /models?limit=3.", {"/models"}),
        ("Send x-openrouter-cache-ttl: 7.", {"X-OpenRouter-Cache-TTL"}),
        ("It is chat.completion.chunk.", {"chat.completion.chunk"}),
        ("It is `usage.max_tokens`.", {"max_tokens"}),
        ("It is max\\_tokens.", {"max_tokens"}),
        ("It is snake_max_tokens_case.", set()),
        ("They look like gen-... and end.", {"gen-"}),
        ("They look like gen-17.", set()),
        ("Falsehood is not FALSE.", {"false"}),
        ("* 429\n* 2", {"429", "2"}),
        ("", set()),
    ],
)
def test_an_answer_names_whole_tokens_only(text: str, expected: set[str]) -> None:
    assert names(text, VALUES) == expected


def test_spellings_of_one_value_are_named_together() -> None:
    candidates = ["Retry-After", "retry-after", "1024"]

    assert names("Read RETRY-AFTER.", candidates) == {"Retry-After", "retry-after"}
    assert is_correct("Read RETRY-AFTER.", "Which header?", "Retry-After", candidates)


def test_no_candidate_and_an_empty_candidate_are_never_named() -> None:
    assert names("anything", []) == set()
    assert names("anything", ["", "``"]) == set()


def test_an_answer_is_right_iff_it_names_the_expected_value_alone() -> None:
    question = "Which code do I get?"

    assert is_correct("You get `429`.", question, "429", VALUES)
    assert not is_correct("You get `429` or `2`.", question, "429", VALUES)
    assert not is_correct("You get `2`.", question, "429", VALUES)
    assert not is_correct("You get an error.", question, "429", VALUES)


def test_repeating_the_question_neither_helps_nor_hurts() -> None:
    question = "Which header goes with 429, and not max_tokens?"

    assert is_correct("With 429 it is `[DONE]`.", question, "[DONE]", VALUES)
    assert not is_correct("It is 429.", question, "429", VALUES)


def test_the_expected_value_need_not_be_among_the_candidates() -> None:
    assert is_correct("It is 77.", "How many?", "77", VALUES)
    assert not is_correct("It is 77 or 2.", "How many?", "77", VALUES)


@given(st.sampled_from(VALUES), st.sampled_from(DECORATIONS), st.sampled_from(["", ".", "!", ","]))
def test_markup_and_punctuation_do_not_hide_a_value(value: str, markup: str, end: str) -> None:
    assert names(f"The value is {markup.format(value)}{end}", VALUES) == {value}


@given(st.sampled_from(VALUES), st.text("abz019_", min_size=1), st.booleans())
def test_a_longer_word_is_another_value(value: str, extra: str, in_front: bool) -> None:
    text = extra + value if in_front else value + extra

    assert names(f"It is {text} there", [value]) == set()


@given(st.lists(st.sampled_from(VALUES), max_size=4), st.permutations(VALUES))
def test_the_order_of_the_candidates_does_not_matter(said: list[str], order: list[str]) -> None:
    text = ", ".join(said)

    assert names(text, order) == names(text, VALUES) == set(said)


@given(st.text(), st.text(), st.sampled_from(VALUES))
def test_two_new_values_are_never_right(before: str, after: str, expected: str) -> None:
    answer = f"{before} , {expected} , 31337 , {after}"

    assert not is_correct(answer, "Which?", expected, [*VALUES, "31337"])


@given(st.text(), st.lists(st.text()))
def test_only_candidates_are_named_whatever_the_text(text: str, candidates: list[str]) -> None:
    assert names(text, candidates) <= set(candidates)
