"""Several processes that answer: one address, one set of limits, engines that one has started."""

import concurrent.futures
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from asking import Refused, Server, chunks
from postgres import Postgres

from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.control import ask_to_reload

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
MENU = "{{slug: me/base, checkpoint: base, engine: llamacpp, slots: {}, context: 4000}}"
COUNTED = r'pipeline_requests_total\{.*process="([^"]*)".*\} (\S+)'
pytestmark = pytest.mark.slow


class House:
    """A server of two workers as a process, its books, and its address."""

    def __init__(self, process: subprocess.Popen[str], books: str) -> None:
        self.process = process
        self.books = books
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        self.port = int(url.split(":")[2].partition("/")[0])
        self.url = url
        self.parent = psutil.Process(process.pid)

    def key(self, **columns: Any) -> Server:
        with open_books(self.books) as books:
            return Server(self.url, Keys(books).create("mine", columns))

    def children(self, word: str) -> list[psutil.Process]:
        found = []
        for child in self.parent.children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just died
                if word in child.cmdline():
                    found.append(child)
        return found

    @property
    def workers(self) -> list[psutil.Process]:
        return self.children("worker")

    @property
    def engines(self) -> list[psutil.Process]:
        return self.children("pipeline.engine.llamacpp_child")

    @property
    def engine(self) -> psutil.Process:
        [engine] = self.engines
        return engine


Start = Callable[..., House]


@pytest.fixture
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder of its own, whose path is short enough for sockets."""
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def start(
    tiny_base: Path, tmp_path: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Start]:
    monkeypatch.setenv("TMPDIR", str(sockets))
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(tiny_base)
    started: list[subprocess.Popen[str]] = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(books: str, slots: int = 4) -> House:
        offer(slots)
        with open_books(books) as opened:
            Keys(opened).create("first")
        command = [sys.executable, "-m", "pipeline", "serve", "serve.yaml", "--port", "0"]
        command += ["--books", books, "--workers", "2"]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        )
        return House(started[-1], books)

    yield run
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
            assert process.returncode == 0
    assert not list(sockets.glob("pipeline-*")), "the folder of sockets is left"


def offer(slots: int, *others: str) -> None:
    Path("serve.yaml").write_text(f"models: [{', '.join([MENU.format(slots), *others])}]")


def ask_all(server: Server, num_requests: int, **fields: Any) -> list[int]:
    """The statuses of as many requests at once."""

    def ask_one(_: int) -> int:
        try:
            server.ask(**HI, **fields)
        except Refused as refused:
            return refused.status
        return 200

    with concurrent.futures.ThreadPoolExecutor(num_requests) as threads:
        return sorted(threads.map(ask_one, range(num_requests)))


def until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_limits_hold_between_workers_in_a_file(start: Start, tmp_path: Path) -> None:
    check_limits(start(str(tmp_path)))


@pytest.mark.postgres
def test_limits_hold_between_workers_in_a_database(start: Start, postgres: Postgres) -> None:
    check_limits(start(postgres.create_database()))


def check_limits(house: House) -> None:
    assert len(house.workers) == 2
    limited = house.key(requests_per_minute=5)
    assert ask_all(limited, 12, max_tokens=3) == [200] * 5 + [429] * 7
    busy = house.key(streams=2)
    with busy.post({**HI, "max_tokens": 3000, "stream": True}) as one:
        next(chunks(one))
        with busy.post({**HI, "max_tokens": 3000, "stream": True}) as two:
            next(chunks(two))
            assert ask_all(busy, 6, max_tokens=3) == [429] * 6
    until(lambda: ask_all(busy, 1, max_tokens=3) == [200])


def test_a_worker_that_dies_has_a_successor_and_the_other_answers(
    start: Start, tmp_path: Path
) -> None:
    house = start(str(tmp_path))
    server = house.key()
    before = {worker.pid for worker in house.workers}
    engine = house.engine.pid

    victim = house.workers[0]
    victim.kill()
    victim.wait(timeout=30)
    assert server.ask(**HI, max_tokens=3).usage["completion_tokens"] == 3
    until(lambda: len(house.workers) == 2)

    assert len(before & {worker.pid for worker in house.workers}) == 1
    assert house.engine.pid == engine
    assert ask_all(server, 8, max_tokens=3) == [200] * 8


def test_workers_find_an_engine_that_was_started_again(start: Start, tmp_path: Path) -> None:
    house = start(str(tmp_path))
    server = house.key()
    with server.post({**HI, "max_tokens": 3000, "stream": True}) as response:
        stream = chunks(response)
        next(stream)
        dead = house.engine.pid
        house.engine.kill()
        *_, last = stream
    assert last["error"]["code"] in (502, 503)

    until(lambda: [engine.pid for engine in house.engines] not in ([], [dead]))
    until(lambda: set(ask_all(server, 4, max_tokens=3)) == {200})


def test_every_worker_offers_what_was_read_again_and_no_stream_is_cut(
    start: Start, tmp_path: Path
) -> None:
    house = start(str(tmp_path), slots=2)
    server = house.key()
    other = MENU.replace("me/base", "me/other").format(1)
    offer(2, other)
    assert "new: me/other" in ask_to_reload(house.port)
    with server.post({**HI, "model": "me/other", "max_tokens": 3500, "stream": True}) as response:
        stream = chunks(response)
        next(stream)
        offer(2)
        assert "gone: me/other" in ask_to_reload(house.port)
        assert ask_all(server, 8, model="me/other") == [400] * 8
        assert ask_all(server, 8, max_tokens=3) == [200] * 8
        *_, last = stream
    assert last["usage"]["completion_tokens"] == 3500
    until(lambda: len(house.engines) == 1)


def test_a_signal_lets_replies_end_and_leaves_no_process(start: Start, tmp_path: Path) -> None:
    house = start(str(tmp_path))
    server = house.key()
    everybody = [house.engine, *house.workers]
    with server.post({**HI, "max_tokens": 300, "stream": True}) as response:
        stream = chunks(response)
        next(stream)
        house.process.send_signal(signal.SIGTERM)
        *_, last = stream
    house.process.communicate(timeout=30)

    assert last["usage"]["completion_tokens"] == 300
    assert house.process.returncode == 0
    assert not psutil.wait_procs(everybody, timeout=1)[1]


def test_without_the_process_that_started_them_no_worker_and_no_engine_lives_on(
    start: Start, tmp_path: Path, sockets: Path
) -> None:
    house = start(str(tmp_path))
    everybody = [house.engine, *house.workers]

    house.process.kill()
    house.process.communicate()

    assert not psutil.wait_procs(everybody, timeout=30)[1]
    for folder in sockets.glob("pipeline-*"):  # who is killed leaves it
        shutil.rmtree(folder)


def test_metrics_are_of_every_process(start: Start, tmp_path: Path) -> None:
    house = start(str(tmp_path))
    server = house.key()
    assert ask_all(server, 10, max_tokens=3) == [200] * 10

    def requests() -> dict[str, float]:
        page = urllib.request.urlopen(f"http://127.0.0.1:{house.port}/metrics", timeout=10)
        lines = page.read().decode().splitlines()
        found = (re.fullmatch(COUNTED, line) for line in lines)
        return {match[1]: float(match[2]) for match in found if match}

    until(lambda: sum(requests().values()) == 10)
    assert set(requests()) <= {"worker-0", "worker-1"}
