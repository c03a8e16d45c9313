"""Sources: a path means the data files it names, in one order, or a sentence."""

from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.sources import file_kind, find_files


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".GZ"])
def test_the_kind_of_a_file_stands_before_its_compression(kind: str, compression: str) -> None:
    assert file_kind(Path(f"some.folder/chats.v2{kind}{compression}")) == kind
    assert file_kind(Path(f"CHATS{kind.upper()}{compression}")) == kind


@pytest.mark.parametrize("name", ["chats", "chats.txt", "chats.gz", "jsonl", "chats.jsonl.bak"])
def test_other_endings_are_no_kind(name: str) -> None:
    assert file_kind(Path(name)) is None


def test_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    make(tmp_path, "notes.txt")

    assert find_files(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]


def test_a_folder_means_the_data_files_in_it_and_below_in_order(tmp_path: Path) -> None:
    make(tmp_path, "b.jsonl", "a.json.gz", "c/d.parquet", "README.md", "c/e.csv.zst", "f.jsonl/g")

    files = find_files(str(tmp_path))

    names = [str(file.relative_to(tmp_path)) for file in files]
    assert names == ["a.json.gz", "b.jsonl", "c/d.parquet", "c/e.csv.zst"]


def test_a_glob_finds_files_in_order_and_no_folders(tmp_path: Path) -> None:
    make(tmp_path, "b.jsonl", "a.jsonl", "a.csv", "d/c.jsonl", "e.jsonl/f.txt")

    assert find_files(f"{tmp_path}/*.jsonl") == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert find_files(f"{tmp_path}/**/c.*") == [tmp_path / "d/c.jsonl"]


def test_paths_start_at_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "chats/a.jsonl")
    monkeypatch.chdir(tmp_path)

    for path in ("chats", "chats/*.jsonl", "./chats/a.jsonl"):
        assert find_files(path) == [Path("chats/a.jsonl")]


def test_a_name_with_a_globs_signs_is_first_of_all_a_name(tmp_path: Path) -> None:
    make(tmp_path, "a[1].jsonl", "a1.jsonl")

    assert find_files(f"{tmp_path}/a[1].jsonl") == [tmp_path / "a[1].jsonl"]


def test_a_path_that_means_nothing_is_named(tmp_path: Path) -> None:
    make(tmp_path, "README.md")

    with pytest.raises(DataError, match=rf"^{tmp_path} is a folder without \.jsonl, \.json, "):
        find_files(str(tmp_path))
    for path in (f"{tmp_path}/none.jsonl", f"{tmp_path}/*.jsonl"):
        with pytest.raises(DataError, match=rf" is missing; .* start at {Path.cwd()}$"):
            find_files(path)


@pytest.mark.parametrize("path", ["chats/**x.jsonl", "x" * 300, "a\0b"])
def test_what_can_be_no_path_is_named(path: str) -> None:
    with pytest.raises(DataError, match=r"is no path or glob: |is missing; ") as caught:
        find_files(path)

    assert "\n" not in str(caught.value)


def test_hidden_copies_in_a_folder_are_left_out(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".hidden.jsonl", ".ipynb_checkpoints/a.jsonl", "sub/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")

    assert find_files(str(tmp_path)) == [tmp_path / "a.jsonl", tmp_path / "sub" / "b.jsonl"]
