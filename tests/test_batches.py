"""Processes that make rows: none outlives what it works for, and none dies unnoticed."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import islice, repeat
from pathlib import Path

import psutil
import pytest

from pipeline.data.batches import IN_PROCESS, Batch, Job, make_batches
from pipeline.data.conversation import Record
from pipeline.errors import DataError, RunError
from pipeline.recipe import Data

pytestmark = pytest.mark.slow
TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}
PARENT = """
import sys
from pathlib import Path
from test_batches import endless

for _ in endless(Path(sys.argv[1]), sys.argv[2]):
    print("a batch", flush=True)
"""


class Marked(str):
    """A source's name that leaves the number of every process it gets to in a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return mark, (str(self),)


def mark(folder: str) -> str:
    (Path(folder) / str(os.getpid())).touch()
    return folder


def endless(base: Path, marks: str) -> Iterator[Batch]:
    """Batches of small conversations without end."""
    records: list[Record | DataError] = [Record(TALK, Path("chats.jsonl"), 1)] * 20
    job = Job(Marked(marks), records, "messages", 1.0, False)
    return make_batches(repeat(job), Data(sources=[{"path": "x"}]), 42, base)


def await_all_at_work(batches: Iterator[Batch], marks: Path) -> set[int]:
    """Take batches until every process there is has begun to make some; returns their numbers."""
    for _ in islice(batches, IN_PROCESS + 1):
        pass
    workers = {int(str(process.pid)) for process in multiprocessing.active_children()}
    assert workers
    while not workers <= {int(path.name) for path in marks.iterdir()}:
        next(batches)
    return workers


def test_ctrl_c_is_not_for_those_who_make_rows(chat_folder: Path, tmp_path: Path) -> None:
    with closing(endless(chat_folder, str(tmp_path))) as batches:
        workers = await_all_at_work(batches, tmp_path)

        for pid in workers:
            os.kill(pid, signal.SIGINT)

        try:
            sizes = [batch.train.num_rows for batch in islice(batches, 50)]
        except KeyboardInterrupt:  # which would end all tests, not this one
            pytest.fail("it came back as a result")
        assert sizes == [20] * 50
        assert {process.pid for process in multiprocessing.active_children()} == workers


def test_a_killed_process_is_one_sentence(chat_folder: Path, tmp_path: Path) -> None:
    with closing(endless(chat_folder, str(tmp_path))) as batches:
        first, *_ = await_all_at_work(batches, tmp_path)

        os.kill(first, signal.SIGKILL)

        with pytest.raises(RunError, match=r"^a process that makes rows was killed, .*\Z"):
            list(batches)
    assert multiprocessing.active_children() == []


def test_nobody_goes_on_for_one_who_wants_no_more(chat_folder: Path, tmp_path: Path) -> None:
    batches = endless(chat_folder, str(tmp_path))
    workers = await_all_at_work(batches, tmp_path)
    processes = multiprocessing.active_children()

    batches.close()  # type: ignore[attr-defined]

    assert [process.exitcode for process in processes if process.exitcode != 0] == []
    assert multiprocessing.active_children() == []
    assert not any(psutil.pid_exists(pid) for pid in workers)


def test_no_process_outlives_a_killed_parent(chat_folder: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(chat_folder), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout is not None
        for _ in range(IN_PROCESS + 1):
            assert parent.stdout.readline() == b"a batch\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        at_work = {int(path.name) for path in tmp_path.iterdir()}

        parent.kill()

        _, left = psutil.wait_procs(children, timeout=30)
        for process in left:
            process.kill()
    assert at_work
    assert at_work <= {process.pid for process in children}
    assert left == []
