"""A server process of ours: spawned, listening on a socket, ended with us."""

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

STOP_TIMEOUT_S = 5
LEAVE_TIMEOUT_S = 5
_POLL_S = 0.05
_OWNED = ".owned"
"""In a socket's folder; locked for as long as its owner lives, however that ends."""


@dataclass(frozen=True)
class Child:
    """A server process and the folder its socket lies in."""

    process: asyncio.subprocess.Process
    folder: Path
    log: Path
    owned: TextIO

    @classmethod
    async def start(
        cls,
        name: str,
        command: Callable[[Path], Sequence[str]],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> "Child":
        """Spawn it; it is not ready yet. `log` will hold what it says, and nothing older.

        `command` is given the socket to listen on, and `environment` is added to ours. The command
        must end when its standard input does.
        """
        _sweep(name)
        with contextlib.ExitStack() as undoing:
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
            undoing.callback(shutil.rmtree, folder)
            owned = undoing.enter_context(_own(folder))
            process = await _spawn(command(_socket(folder)), log, environment or {})
            undoing.pop_all()
        return cls(process, folder, log, owned)

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return _socket(self.folder)

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended."""
        return self.process.returncode is not None

    def kill(self) -> None:
        """End it and its own children at once; while it loads a model it hears of nothing else."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Ask it to end, then make it; its socket goes too. Twice does no harm."""
        if self.owned.closed:
            return
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            self.kill()
            await self.process.wait()
        await self._let_leave()
        self.kill()  # what it has started and left behind
        shutil.rmtree(self.folder, ignore_errors=True)
        self.owned.close()

    async def _let_leave(self) -> None:
        """Give a moment to what it has started: vLLM's processes have memory to free."""
        for _ in range(round(LEAVE_TIMEOUT_S / _POLL_S)):
            try:
                os.killpg(self.process.pid, 0)
            except (ProcessLookupError, PermissionError):  # nobody is left, or only dead ones
                return
            await asyncio.sleep(_POLL_S)


def _socket(folder: Path) -> Path:
    return folder / "engine.sock"


def python_path() -> str:
    """By which a child finds this package, also where it is not installed."""
    root = str(Path(__file__).parents[2])
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


async def _spawn(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> asyncio.subprocess.Process:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return await asyncio.create_subprocess_exec(
            *command,
            # The child ends when this pipe does: also when this process is killed.
            stdin=asyncio.subprocess.PIPE,
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONPATH": python_path(), **environment},
            # Ctrl-C in a terminal reaches a whole group; we decide when the child ends.
            start_new_session=True,
        )


def _own(folder: Path) -> TextIO:
    """Mark a folder as in use, for as long as the file is open; it is locked once it has its name.

    The child does not inherit the file, so it is free as soon as this process has ended.
    """
    owned = (folder / f"{_OWNED}.new").open("w")
    fcntl.flock(owned, fcntl.LOCK_EX)
    (folder / f"{_OWNED}.new").rename(folder / _OWNED)
    return owned


def _sweep(name: str) -> None:
    """Remove the folders whose owners were killed before their child could."""
    for file in Path(tempfile.gettempdir()).glob(f"{name}-*/{_OWNED}"):
        with contextlib.suppress(OSError), file.open() as owned:
            fcntl.flock(owned, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.parent)
