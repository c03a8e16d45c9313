"""A merge that was interrupted goes on from its whole shards; of a mistake nothing is left."""

import errno
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from adapters import make_adapter
from transformers import AutoModelForCausalLM

from pipeline.base.checkpoint import read_layout
from pipeline.errors import Interrupted, RunError
from pipeline.merge import merge
from pipeline.merge import write as writing
from pipeline.recipe import Merge

Stop = Callable[[], None]


@pytest.fixture(scope="module")
def sharded(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` in five shards."""
    folder = tmp_path_factory.mktemp("bases") / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(folder, max_shard_size="70KB")
    assert len(read_layout(folder)) == 5
    return folder


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def fill_the_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stop_at_the_third_shard(monkeypatch: pytest.MonkeyPatch, stop: Stop, short: int = 100) -> None:
    """In the middle of it, some bytes `short` of its end."""
    write, written = writing.write_shard, []

    def write_some(path: Path, *rest: Any) -> None:
        written.append(path)
        write(path, *rest)
        if len(written) == 3:
            path.write_bytes(path.read_bytes()[: path.stat().st_size - short])
            stop()

    monkeypatch.setattr(writing, "write_shard", write_some)


def interrupt(base: Path, adapter: Path, out: Path) -> None:
    """A merge that is stopped with two shards whole."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at_the_third_shard(patch, press_ctrl_c)
        with pytest.raises(Interrupted) as caught:
            merge(base, adapter, out)
    assert caught.value.exit_code == 130
    assert f"2 of {len(read_layout(base))} shards are in {out}.partial" in str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file it is, and when it was written."""
    found = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def test_a_killed_merge_goes_on_without_writing_its_whole_shards_again(
    sharded: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "merged", tmp_path / "merged.partial"

    def be_killed() -> None:
        stop_at_the_third_shard(monkeypatch, kill)
        merge(sharded, tiny_adapter, out)

    process = multiprocessing.get_context("fork").Process(target=be_killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    whole = identities(partial)
    assert len(whole) == 2

    merge(sharded, tiny_adapter, out)
    merge(sharded, tiny_adapter, tmp_path / "at once")
    assert identities(out).items() >= whole.items()
    assert contents(out) == contents(tmp_path / "at once")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at once", "merged"]


def test_an_interrupted_merge_keeps_its_whole_shards_and_nothing_else(
    sharded: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "merged", tmp_path / "merged.partial"
    interrupt(sharded, tiny_adapter, out)
    assert [path.name for path in tmp_path.iterdir()] == ["merged.partial"]
    whole = identities(partial)
    assert {path.name for path in partial.iterdir()} == {*whole, ".made_from"}

    merge(sharded, tiny_adapter, out)
    assert identities(out).items() >= whole.items()
    assert ".made_from" not in contents(out)


def test_a_merge_keeps_out_of_the_way_of_another_one_at_work(
    sharded: Path,
    tiny_base: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, other = tmp_path / "merged", make_adapter(tiny_base, tmp_path / "other", seed=1)

    def merge_the_other() -> None:
        monkeypatch.undo()
        with pytest.raises(RunError, match=r"another command is at work in .*merged\.partial"):
            merge(sharded, other, out)

    stop_at_the_third_shard(monkeypatch, merge_the_other, short=0)
    merge(sharded, tiny_adapter, out)
    merge(sharded, tiny_adapter, tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")


def test_a_folder_that_appears_during_a_merge_is_not_overwritten(
    sharded: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"

    def make_a_folder() -> None:
        out.mkdir()
        (out / "precious").touch()

    with pytest.MonkeyPatch.context() as patch:
        stop_at_the_third_shard(patch, make_a_folder, short=0)
        with pytest.raises(Interrupted, match=r"merged has appeared .* from .*merged\.partial"):
            merge(sharded, tiny_adapter, out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    whole = identities(tmp_path / "merged.partial")
    out.rename(tmp_path / "mine")
    merge(sharded, tiny_adapter, out)
    assert identities(out) == whole


def test_a_folder_of_somebody_elses_is_not_emptied(
    sharded: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial" / "precious").touch()
    with pytest.raises(RunError, match=r"merged\.partial is where .* not empty; rename it"):
        merge(sharded, tiny_adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.rglob("*")] == ["merged.partial", "precious"]


@pytest.mark.parametrize("other", ["adapter", "base", "dtype", "seed", "method"])
def test_a_merge_of_something_else_begins_afresh(
    sharded: Path, tiny_base: Path, tiny_adapter: Path, tmp_path: Path, other: str
) -> None:
    base = Path(shutil.copytree(sharded, tmp_path / "base"))
    interrupt(base, tiny_adapter, tmp_path / "merged")
    if other == "adapter":
        tiny_adapter = make_adapter(tiny_base, tmp_path / "adapter", seed=1)
    if other == "base":
        name = next(iter(read_layout(base)))
        (base / name).write_bytes((base / name).read_bytes()[:-1] + b"\x12")
    arguments = {
        "method": "qlora" if other == "method" else "lora",
        "settings": Merge(
            dtype="float32" if other == "dtype" else "bfloat16",
            rounding="stochastic" if other == "seed" else "nearest",
        ),
        "seed": 7 if other == "seed" else 0,
    }
    merge(base, tiny_adapter, tmp_path / "merged", **arguments)
    merge(base, tiny_adapter, tmp_path / "at once", **arguments)
    assert contents(tmp_path / "merged") == contents(tmp_path / "at once")


def test_a_full_disk_leaves_nothing_even_of_a_merge_that_went_on(
    sharded: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(sharded, tiny_adapter, tmp_path / "merged")
    stop_at_the_third_shard(monkeypatch, fill_the_disk)
    with pytest.raises(RunError, match="the disk is full"):
        merge(sharded, tiny_adapter, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_what_is_there_needs_no_more_room(
    sharded: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(sharded, tiny_adapter, tmp_path / "merged")
    whole = {path.name for path in (tmp_path / "merged.partial").iterdir()}
    missing = [shard for name, shard in read_layout(sharded).items() if name not in whole]
    needed = sum(tensor.num_bytes for shard in missing for tensor in shard)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    merge(sharded, tiny_adapter, tmp_path / "merged")
    with pytest.raises(RunError, match=r"needs 0\.0 GB and the disk has 0\.0 GB free"):
        merge(sharded, tiny_adapter, tmp_path / "all of it")
