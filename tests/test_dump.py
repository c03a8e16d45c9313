"""The dump: what a stranger needs to check rows from outside."""

import json
from pathlib import Path
from typing import Any

import pytest
from row_files import write_rows

from pipeline.data.dump import dump_rows
from pipeline.data.rows import Row
from pipeline.errors import RunError

ROWS = [
    Row([1, 2], [3, 4], "über.jsonl:1", 3, "thinking"),
    Row([], [5], "texts.jsonl:2", 0, "text"),
]


def test_every_row_of_every_part_is_a_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.arrow", ROWS)
    write_rows(tmp_path / "eval.arrow", ROWS[:1])
    out = tmp_path / "rows.jsonl"

    dump_rows({"train": tmp_path / "train.arrow", "eval": tmp_path / "eval.arrow"}, out)

    first = {
        "input_ids": [1, 2, 3, 4],
        "labels": [-100, -100, 3, 4],
        "source": "über.jsonl:1",
        "turn": 3,
        "mode": "thinking",
    }
    second = {
        "input_ids": [5],
        "labels": [5],
        "source": "texts.jsonl:2",
        "turn": 0,
        "mode": "text",
    }
    lines = out.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        first | {"part": "train"},
        second | {"part": "train"},
        first | {"part": "eval"},
    ]
    assert not list(tmp_path.glob("*.partial"))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.arrow", ROWS)
    out = tmp_path / "none" / "rows.jsonl"

    with pytest.raises(RunError, match=f"^{out} cannot be written: No such file or directory$"):
        dump_rows({"train": tmp_path / "train.arrow"}, out)


@pytest.mark.parametrize("name", ["rows.jsonl", "folder", "."])
def test_nothing_is_ever_overwritten(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "train.arrow", ROWS)
    (tmp_path / "rows.jsonl").write_text("precious")
    (tmp_path / "folder").mkdir()

    with pytest.raises(RunError, match="is there already"):
        dump_rows({"train": tmp_path / "train.arrow"}, tmp_path / name)

    assert (tmp_path / "rows.jsonl").read_text() == "precious"
    assert not list(tmp_path.glob("*.partial"))


def test_rows_that_break_off_leave_nothing(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.arrow", tmp_path / "broken.arrow"
    write_rows(whole, ROWS * 1000)
    broken.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])

    with pytest.raises(RunError):
        dump_rows({"train": whole, "eval": broken}, tmp_path / "rows.jsonl")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.arrow", "whole.arrow"]


def test_nothing_has_the_final_name_before_all_is_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.arrow", ROWS * 1000)
    out, seen = tmp_path / "rows.jsonl", []

    class Parts(dict[str, Path]):
        """Looks, whenever the next part is asked for, whether the file is there."""

        def items(self) -> Any:
            for item in super().items():
                yield item
                seen.append(out.exists())

    dump_rows(Parts(train=tmp_path / "train.arrow", eval=tmp_path / "train.arrow"), out)

    assert seen == [False, False]
    assert len(out.read_text("utf-8").splitlines()) == 4000
