"""What is kept of replies, for how long, and for whom."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.chat import ToolCall
from pipeline.engine.protocol import TokenLogprob
from pipeline.serve.api.response_cache import (
    MISS_HEADERS,
    Kept,
    Question,
    ResponseCache,
    Wish,
    read_wish,
)
from pipeline.serve.replying.events import Called, Ended, Said

END = Ended("stop", "stop")
KEPT = Kept(((0, Said("answer", "hello")), (0, END)), "gen-1-a", "local/tiny", "Acme")
QUESTION = Question.of(1, "local/tiny", "chat", is_streamed=False, body=b"{}")
WISH = Wish()


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def numbered(number: int) -> Question:
    return Question.of(number, "local/tiny", "chat", is_streamed=False, body=b"{}")


@pytest.mark.parametrize(
    ("headers", "wish"),
    [
        ({}, None),
        ({"x-openrouter-cache": "false"}, None),
        ({"x-openrouter-cache-ttl": "60"}, None),
        ({"x-openrouter-cache": "true"}, Wish(300)),
        ({"x-openrouter-cache": " True "}, Wish(300)),
        ({"x-openrouter-cache": "true", "x-openrouter-cache-ttl": "60"}, Wish(60)),
        ({"x-openrouter-cache": "true", "x-openrouter-cache-ttl": "0"}, Wish(1)),
        ({"x-openrouter-cache": "true", "x-openrouter-cache-ttl": "-5"}, Wish(1)),
        ({"x-openrouter-cache": "true", "x-openrouter-cache-ttl": "99999999"}, Wish(86400)),
        ({"x-openrouter-cache": "true", "x-openrouter-cache-ttl": "9" * 5000}, Wish(300)),
        ({"x-openrouter-cache": "true", "x-openrouter-cache-ttl": "soon"}, Wish(300)),
        ({"x-openrouter-cache": "true", "x-openrouter-cache-clear": "true"}, Wish(300, True)),
    ],
)
def test_headers_say_whether_and_how_long(headers: dict[str, str], wish: Wish | None) -> None:
    assert read_wish(headers) == wish


def test_the_same_question_finds_the_reply_until_its_time_is_over() -> None:
    clock = Clock()
    cache = ResponseCache(clock=clock)

    assert cache.look_up(QUESTION, WISH) is None
    cache.store(QUESTION, Wish(ttl_s=60), KEPT)
    clock.now_s += 12.7
    hit = cache.look_up(QUESTION, Wish(ttl_s=9999))

    assert hit is not None
    assert hit.kept == KEPT
    assert hit.headers == {
        "X-OpenRouter-Cache-Status": "HIT",
        "X-OpenRouter-Cache-Age": "12",
        "X-OpenRouter-Cache-TTL": "48",
        "X-OpenRouter-Cache-Source-Id": "gen-1-a",
    }
    assert MISS_HEADERS == {"X-OpenRouter-Cache-Status": "MISS"}
    clock.now_s += 47.2
    assert cache.look_up(QUESTION, WISH) is not None
    clock.now_s += 0.1
    assert cache.look_up(QUESTION, WISH) is None


@pytest.mark.parametrize(
    "other",
    [
        {"key_id": 2},
        {"key_id": None},
        {"model": "local/other"},
        {"route": "messages"},
        {"is_streamed": True},
        {"body": b'{ "a": 1}'},
    ],
    ids=str,
)
def test_another_question_finds_nothing(other: dict[str, Any]) -> None:
    cache = ResponseCache()
    same = {"key_id": 1, "model": "m", "route": "chat", "is_streamed": False, "body": b'{"a": 1}'}

    cache.store(Question.of(**same), WISH, KEPT)

    assert cache.look_up(Question.of(**same), WISH) is not None
    assert cache.look_up(Question.of(**(same | other)), WISH) is None


def test_a_client_may_have_it_made_anew() -> None:
    cache = ResponseCache()
    cache.store(QUESTION, WISH, KEPT)

    assert cache.look_up(QUESTION, Wish(clears=True)) is None
    assert cache.look_up(QUESTION, WISH) is None
    cache.store(QUESTION, Wish(clears=True), replace(KEPT, source_id="gen-2-b"))
    hit = cache.look_up(QUESTION, WISH)

    assert hit is not None
    assert hit.kept.source_id == "gen-2-b"


@pytest.mark.parametrize(
    "broken",
    [
        replace(KEPT, events=KEPT.events[:1]),
        replace(KEPT, events=()),
        replace(KEPT, num_choices=2),
    ],
)
def test_a_reply_that_broke_off_is_not_kept_nor_what_was_kept_before(broken: Kept) -> None:
    cache = ResponseCache()
    cache.store(QUESTION, WISH, KEPT)

    cache.store(QUESTION, WISH, broken)

    assert cache.look_up(QUESTION, WISH) is None


def test_of_too_many_those_go_that_nobody_asks_for() -> None:
    cache = ResponseCache(max_replies=3)
    for number in (1, 2, 3):
        cache.store(numbered(number), WISH, KEPT)

    cache.look_up(numbered(1), WISH)
    cache.store(numbered(4), WISH, KEPT)

    found = [number for number in range(1, 5) if cache.look_up(numbered(number), WISH)]
    assert found == [1, 3, 4]


@pytest.mark.parametrize(
    "event",
    [
        Said("answer", "x" * 1000),
        Said("reasoning", "x" * 1000),
        Called(0, ToolCall("f", "x" * 1000)),
        Said("answer", "", (TokenLogprob(1, -0.5, ((1, -0.5),) * 20),)),
    ],
    ids=lambda event: type(event).__name__,
)
def test_a_reply_that_would_fill_it_all_is_not_kept(event: Said | Called) -> None:
    cache = ResponseCache(max_characters=1000)
    cache.store(numbered(1), WISH, KEPT)

    cache.store(numbered(2), WISH, replace(KEPT, events=((0, event), (0, END))))

    assert cache.look_up(numbered(2), WISH) is None
    assert cache.look_up(numbered(1), WISH) is not None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 900)), max_size=40))
def test_it_never_holds_more_than_it_may(stores: list[tuple[int, int]]) -> None:
    cache = ResponseCache(max_replies=4, max_characters=2000)

    for number, size in stores:
        events = ((0, Said("answer", "x" * size)), (0, END))
        cache.store(numbered(number), WISH, replace(KEPT, events=events))
        found = [hit.kept for n in range(6) if (hit := cache.look_up(numbered(n), WISH))]
        assert len(found) <= 4
        assert sum(kept.num_characters for kept in found) <= 2000
        assert cache.look_up(numbered(number), WISH) is not None


def test_all_is_forgotten_or_what_one_model_has_said() -> None:
    cache = ResponseCache(max_characters=1000)
    cache.store(numbered(1), WISH, KEPT)
    cache.store(numbered(2), WISH, replace(KEPT, model="local/other"))

    cache.clear(["local/tiny"])
    assert [bool(cache.look_up(numbered(number), WISH)) for number in (1, 2)] == [False, True]

    cache.clear()
    assert cache.look_up(numbered(2), WISH) is None
