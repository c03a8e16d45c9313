"""Makes vLLM's server end, with every process it has started, as soon as its standard input does.

Run by the Python of vLLM's own environment, without this package:
`python vllm_child.py SOCKET WORDS...` becomes `vllm serve WORDS --uds SOCKET`. What it forks before
that stays behind as its guard: vLLM's engine and workers go on when vLLM's main process is killed.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

GRACE_S = 4.5
"""For SIGTERM, which vLLM needs two seconds for; its parent waits for five."""
LEAVE_S = 4.0
"""For what is left after that, to free shared memory."""


def main() -> None:
    """Fork the guard, then become vLLM's server."""
    socket, *words = sys.argv[1:]
    server = os.getpid()
    if os.fork() == 0:
        _guard(server, Path(socket))
        return
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())  # the guard's alone
    serve = ["-P", "-m", "vllm.entrypoints.cli.main", "serve"]
    os.execv(sys.executable, [sys.executable, *serve, *words, "--uds", socket])


def _guard(server: int, socket: Path) -> None:
    """Wait until the server or standard input has ended, then end what is left."""
    os.setsid()  # out of the group that is killed below
    while _lives(server) and not _has_ended(sys.stdin.fileno()):
        pass
    if _lives(server):
        os.kill(server, signal.SIGTERM)
    _wait(GRACE_S, lambda: not _lives(server))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server, signal.SIGTERM)
        _wait(LEAVE_S, lambda: os.killpg(server, 0))  # which raises as soon as nobody is left
        os.killpg(server, signal.SIGKILL)
    shutil.rmtree(socket.parent, ignore_errors=True)


def _wait(most_s: float, is_over: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + most_s
    while not is_over() and time.monotonic() < deadline_s:
        time.sleep(0.05)


def _lives(server: int) -> bool:
    """Whether the server, our parent, has not ended."""
    return os.getppid() == server


def _has_ended(pipe: int) -> bool:
    """Whether a pipe that nobody writes into has been closed; it is waited for a little."""
    return bool(select.select([pipe], [], [], 0.2)[0])


if __name__ == "__main__":
    main()
