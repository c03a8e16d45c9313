"""The run folder: what is written stays whole, and the manifest knows what was made from what."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RunError
from pipeline.run import (
    Run,
    fresh_folder,
    hash_file,
    hash_folder,
    hash_value,
    hash_weights,
    publish,
    read_json,
    write_json,
)

SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "mine")


def test_a_named_run_lies_under_the_current_directory() -> None:
    assert Run.named("mine").folder == Path("runs/mine")


def test_a_stage_that_never_ran_has_no_record(run: Run) -> None:
    assert run.stage("data") is None
    assert run.changed("data", {"a": "1"}) is None
    assert not run.folder.exists()


def test_a_recorded_stage_is_read_back(run: Run) -> None:
    run.record("data", {"a": "1"}, {"rows": "2"})

    assert run.stage("data") == {"inputs": {"a": "1"}, "outputs": {"rows": "2"}}
    assert run.output("data", "rows") == "2"
    assert run.changed("data", {"a": "1"}) == []


def test_changed_names_inputs_that_differ_are_new_or_are_gone(run: Run) -> None:
    run.record("data", {"same": "1", "differs": "1", "gone": "1"}, {})

    changed = run.changed("data", {"same": "1", "differs": "2", "new": "1"})

    assert changed == ["differs", "gone", "new"]


def test_recording_again_replaces_only_that_stage(run: Run) -> None:
    run.record("data", {"a": "1"}, {"rows": "1"})
    run.record("train", {"b": "1"}, {"adapter": "1"})
    run.record("data", {"a": "2"}, {"others": "2"})

    assert run.stage("data") == {"inputs": {"a": "2"}, "outputs": {"others": "2"}}
    assert run.output("train", "adapter") == "1"


@pytest.mark.parametrize("ran", [False, True])
def test_an_output_that_is_not_there_names_the_command_that_makes_it(run: Run, ran: bool) -> None:
    if ran:
        run.record("data", {}, {"other": "1"})

    with pytest.raises(RunError) as caught:
        run.output("data", "rows")

    assert str(caught.value) == f"{run.folder} has no rows yet: run `pipeline data` first"


def test_facts_and_stages_live_side_by_side(run: Run) -> None:
    run.describe(seed=42)
    run.record("data", {}, {})
    run.describe(base_commit="abc")

    assert run.facts() == {
        "stages": {"data": {"inputs": {}, "outputs": {}}},
        "seed": 42,
        "base_commit": "abc",
    }


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=9,
)


@given(values)
def test_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"

    write_json(path, value)

    assert read_json(path) == value


def test_json_that_cannot_be_written_leaves_the_older_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.json"
    write_json(path, {"old": 1})

    with pytest.raises(TypeError):
        write_json(path, {"first": 1, "second": object()})

    assert json.loads(path.read_text("utf-8")) == {"old": 1}


def test_json_is_never_half_there_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value.json"
    write_json(path, "old")
    seen = []

    def fsync(_: int) -> None:
        seen.append(json.loads(path.read_text("utf-8")))

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(path, "new")

    assert seen == ["old"]
    assert read_json(path) == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["value.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "runs"
    file.write_text("")

    with pytest.raises(RunError, match=f"^{file}/mine/a.json cannot be written: "):
        write_json(file / "mine" / "a.json", 1)
    with pytest.raises(RunError, match=f"^{file}/mine cannot be written: "):
        fresh_folder(file / "mine")


def test_missing_and_broken_json_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")

    with pytest.raises(RunError, match=f"^{tmp_path}/none.json is missing$"):
        read_json(tmp_path / "none.json")
    with pytest.raises(RunError, match=f"^{broken} is not JSON: .*; delete it and run the stage"):
        read_json(broken)


def test_a_published_folder_replaces_the_older_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for name in ("one", "two"):
        temporary = fresh_folder(path)
        (temporary / "deep").mkdir()
        (temporary / "deep" / name).write_text(name)
        assert not (path / "deep" / name).exists()
        publish(temporary, path)

    assert [item.name for item in tmp_path.iterdir()] == ["data"]
    assert [item.name for item in (path / "deep").iterdir()] == ["two"]


def test_a_fresh_folder_holds_nothing_of_a_cut_attempt(tmp_path: Path) -> None:
    (fresh_folder(tmp_path / "data") / "half").write_text("")

    assert list(fresh_folder(tmp_path / "data").iterdir()) == []


def test_leftovers_of_a_cut_publish_do_not_stop_the_next(tmp_path: Path) -> None:
    path, old = tmp_path / "data", tmp_path / "data.old"
    for folder in (path, old):
        folder.mkdir()
        (folder / "stale").write_text("")

    publish(fresh_folder(path), path)

    assert not old.exists()
    assert list(path.iterdir()) == []


def test_a_files_hash_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")

    assert hash_file(tmp_path / "abc") == SHA256_OF_ABC


def test_a_folders_hash_knows_names_and_bytes_not_times(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "a"
    file.write_text("1")
    first = hash_folder(tmp_path)

    os.utime(file, (0, 0))
    assert hash_folder(tmp_path) == first
    file.write_text("2")
    assert hash_folder(tmp_path) != first
    file.write_text("1")
    file.rename(file.with_name("b"))
    assert hash_folder(tmp_path) != first


def test_a_values_hash_does_not_know_the_order_of_keys() -> None:
    assert hash_value({"a": 1, "b": [2]}) == hash_value({"b": [2], "a": 1})
    assert hash_value({"a": 1}) != hash_value({"a": 2})


def test_weights_that_did_not_change_are_not_read_again(tmp_path: Path) -> None:
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_text("abc")
    config.write_text("{}")
    (tmp_path / "README.md").write_text("not part of it")
    (tmp_path / "folder.json").mkdir()
    first, known = hash_weights(tmp_path, {})
    assert set(known) == {"model.safetensors", "config.json"}
    assert known["model.safetensors"]["sha256"] == SHA256_OF_ABC

    # Other bytes of the same size and time show that the file is not opened.
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    weights.write_text("abd")
    os.utime(weights, ns=times)

    assert hash_weights(tmp_path, known) == (first, known)
    assert hash_weights(tmp_path, {})[0] != first


def test_weights_of_another_size_or_time_are_read_again(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_text("abc")
    first, known = hash_weights(tmp_path, {})

    os.utime(weights, (0, 0))
    touched, known_touched = hash_weights(tmp_path, known)
    weights.write_text("abcd")
    os.utime(weights, (0, 0))
    longer, _ = hash_weights(tmp_path, known_touched)

    assert touched == first
    assert known_touched != known
    assert longer != first
