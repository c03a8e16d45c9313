"""The soak: short runs of each of its parts, and that it sees what is wrong."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from books import generation

from pipeline.bench.soak import LawBroken, Result, table
from pipeline.bench.soak_ask import Told
from pipeline.bench.soak_books import balance
from pipeline.bench.soak_ends import Stream, check_cancelled
from pipeline.bench.soak_engine import HEAVY, word
from pipeline.bench.soak_faults import Faults, soak_faults
from pipeline.bench.soak_findings import Finding, ordered
from pipeline.bench.soak_load import Overload, Turns, soak_memory, soak_overload
from pipeline.bench.soak_streams import Reading, Streams, soak_streams
from pipeline.serve.books.database import open_books
from pipeline.serve.books.ledger import open_ledger

COST = 24 * 123_457 - 16 * (123_457 - 12_345) + 90 * 654_321
ROW = {"cost_picodollars": COST, "error_type": None}
USAGE = {
    "prompt_tokens": 24,
    "completion_tokens": 90,
    "completion_tokens_details": {"reasoning_tokens": 60},
    "cost": COST / 10**12,
}


def broken(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if not finding.is_kept]


@pytest.mark.slow
def test_streams_lose_nothing_and_who_does_not_read_holds_nobody_up(
    chat_folder: Path, tmp_path: Path
) -> None:
    streams = Streams(num_streams=40, num_words=20, step_s=0.1, num_stopped=1)

    assert broken(asyncio.run(soak_streams(chat_folder, streams, tmp_path))) == []


@pytest.mark.slow
def test_a_server_stays_as_large_as_it_was(chat_folder: Path, tmp_path: Path) -> None:
    turns = Turns(num_requests=400, num_before=200, num_words=4)

    assert broken(asyncio.run(soak_memory(chat_folder, turns, tmp_path))) == []


@pytest.mark.slow
def test_of_too_many_requests_the_rest_is_told_to_come_back(
    chat_folder: Path, tmp_path: Path
) -> None:
    overload = Overload(slots=2, queue=2, num_words=10, step_s=0.02, seconds=3.0)

    assert broken(asyncio.run(soak_overload(chat_folder, overload, tmp_path))) == []


@pytest.mark.slow
def test_books_balance_after_faults_and_a_stop_and_a_kill(tiny_base: Path, tmp_path: Path) -> None:
    faults = Faults(seed=1, seconds=5.0, num_clients=6, num_streams=6)

    assert broken(asyncio.run(soak_faults(tiny_base, faults, tmp_path))) == []


def told_of(*contents: str, num_words: int = 3, number: int = 7) -> Reading:
    """A stream of so many words, as it was told."""
    reading = Reading(number, num_words)
    for content in contents:
        reading.take({"choices": [{"delta": {"content": content}}]})
    reading.take({"choices": [], "usage": {"completion_tokens": num_words}})
    return reading


def test_a_stream_is_whole_if_all_its_words_came_in_their_order() -> None:
    words = [word(7, place) for place in range(3)]

    assert told_of(*words).fault is None
    assert told_of("".join(words[:2]) + words[2][:2], words[2][2:]).fault is None
    assert told_of(*words[:2]).fault
    assert told_of(*words, words[2]).fault
    assert told_of(words[0], words[2], words[1]).fault
    assert told_of(words[0], word(8, 1), words[2]).fault
    assert told_of(*words, num_words=4).fault
    assert len(word(HEAVY, 0)) == len(word(HEAVY + 1, 999)) == 2048


@pytest.mark.parametrize(
    ("row", "usage", "num_faults"),
    [
        (ROW, USAGE, [0, 0]),
        (ROW, {**USAGE, "completion_tokens": 91}, [1, 0]),
        (ROW, {**USAGE, "cost": 0}, [1, 0]),
        ({"cost_picodollars": COST + 1, "error_type": None}, None, [0, 1]),
        ({"cost_picodollars": COST}, None, [0, 1]),  # it failed, and costs something
        (None, USAGE, [1, 0]),
    ],
)
def test_books_are_off_by_one_token_one_pico_dollar_or_one_row(
    row: dict[str, Any] | None, usage: Any, num_faults: list[int], tmp_path: Path
) -> None:
    told = Told(usages={generation(1).id: usage} if usage else {})
    with open_books(str(tmp_path)) as books, open_ledger(books) as ledger:
        for said in [row] if row else []:
            asyncio.run(ledger.record(generation(1, **said)))

    found = balance(tmp_path, told)

    assert [not finding.is_kept for finding in found] == [num > 0 for num in num_faults]


@pytest.mark.parametrize(
    ("row", "is_kept"),
    [
        ({"cancelled": True, "completion_tokens": 3}, True),
        ({"cancelled": True, "completion_tokens": 2}, False),
        ({"cancelled": False, "completion_tokens": 3}, False),
        (None, False),
    ],
)
def test_a_stream_that_was_killed_is_in_the_books_as_far_as_it_had_been_told_in_time(
    row: dict[str, Any] | None, is_kept: bool, tmp_path: Path
) -> None:
    stream = Stream(generation(1).id, came_s=[10.0, 10.1, 10.2, 12.5, 13.0])
    with open_books(str(tmp_path)) as opened, open_ledger(opened) as ledger:
        for said in [row] if row else []:
            asyncio.run(ledger.record(generation(1, **said)))

    assert check_cancelled(tmp_path, [stream]).is_kept == is_kept


def test_only_a_failure_of_something_that_is_missing_is_no_fault() -> None:
    told = Told()
    told.note({"id": "a", "choices": [], "error": {"code": 502, "message": "the engine died"}})
    told.refuse(503, "come back")
    assert told.wrong == []

    told.refuse(500, "Internal Server Error")
    told.refuse(503, "")
    told.refuse(404, "not found")
    assert len(told.wrong) == 3


def test_a_broken_law_is_named_and_ends_with_exit_code_1() -> None:
    kept, lost = Finding("a law", "kept"), ordered("nothing is lost", ["stream 3", "stream 5"])
    result = Result("measured here", [kept, lost])

    assert "| nothing is lost | 2 faults, such as: stream 3 | NO |" in table(result)
    with pytest.raises(LawBroken, match=r"1 laws are broken: nothing is lost \(2 faults") as caught:
        result.check()
    assert caught.value.exit_code == 1
    Result("", [kept]).check()
