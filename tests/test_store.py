"""Rows on disk come back as they were."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import write_rows

from pipeline.data.rows import PairRow, Row
from pipeline.data.store import PAIRS, ROWS, Writer, read_rows, read_spread, to_batch

ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
generated_rows = st.builds(
    Row,
    prompt_ids=ids,
    completion_ids=ids,
    source=st.text(max_size=9),
    turn=st.integers(0, 2**31 - 1),
    mode=st.sampled_from(["thinking", "direct"]),
)


@settings(deadline=None)
@given(st.lists(generated_rows, max_size=8))
def test_rows_come_back_from_the_disk_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row]
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.arrow"

    write_rows(path, iter(rows))

    assert list(read_rows(path)) == rows


def test_more_rows_than_one_batch_keep_their_order(tmp_path: Path) -> None:
    rows = [Row([i], [i + 1], f"x:{i}", 1, "direct") for i in range(2500)]

    sha256 = write_rows(tmp_path / "rows.arrow", rows)

    assert list(read_rows(tmp_path / "rows.arrow")) == rows
    assert sha256 != write_rows(tmp_path / "rows.arrow", reversed(rows))


def test_a_pair_of_files_differs_however_ids_are_cut_into_rows(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one", [Row([1], [2, 3], "x:1", 1, "direct")])
    other = write_rows(tmp_path / "other", [Row([1, 2], [3], "x:1", 1, "direct")])

    assert one != other


def test_the_hash_of_rows_does_not_depend_on_their_batches(tmp_path: Path) -> None:
    rows = [Row([i] * (i % 3), [i + 1], f"x:{i}", 1, "direct") for i in range(20)]

    with Writer(tmp_path / "one", ROWS) as writer:
        for start in range(0, 20, 7):
            writer.write(to_batch(rows[start : start + 7], ROWS))

    assert writer.sha256 == write_rows(tmp_path / "other", rows)
    assert writer.num_rows == 20


def test_pairs_are_stored_in_columns_of_their_own(tmp_path: Path) -> None:
    rows = [PairRow([1, 2], [3], [4, 5], "x:1", "thinking")]

    with Writer(tmp_path / "pairs.arrow", PAIRS) as writer:
        writer.write(to_batch(rows, PAIRS))

    with pa.OSFile(str(tmp_path / "pairs.arrow")) as file:
        assert pa.ipc.open_stream(file).read_all().to_pylist() == [vars(row) for row in rows]


@pytest.mark.parametrize(("size", "wanted", "places"), [(10, 5, [0, 2, 4, 6, 8]), (2, 5, [0, 1])])
def test_a_spread_of_rows_is_even(
    tmp_path: Path, size: int, wanted: int, places: list[int]
) -> None:
    rows = [Row([i], [i], f"x:{i}", 1, "direct") for i in range(size)]
    write_rows(tmp_path / "rows.arrow", rows)

    assert read_spread(tmp_path / "rows.arrow", wanted) == [rows[i] for i in places]


def test_a_spread_of_no_rows_is_empty(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.arrow", [])

    assert read_spread(tmp_path / "rows.arrow", 3) == []


def test_pairs_are_read_as_the_rows_of_both_replies(tmp_path: Path) -> None:
    pairs = [PairRow([1, 2], [3], [4, 5], f"x:{line}", "thinking") for line in (1, 2, 3)]
    with Writer(tmp_path / "pairs.arrow", PAIRS) as writer:
        writer.write(to_batch(pairs, PAIRS))

    rows = list(read_rows(tmp_path / "pairs.arrow"))

    assert rows[:2] == [
        Row([1, 2], [3], "x:1 chosen", 0, "thinking"),
        Row([1, 2], [4, 5], "x:1 rejected", 0, "thinking"),
    ]
    assert len(rows) == 6
    assert read_spread(tmp_path / "pairs.arrow", 2) == rows[:4]
