"""`pipeline reload`: a socket at which a server obeys the user it belongs to, and nobody else."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.serve.books.database import default_books

log = logging.getLogger(__name__)

_RELOAD = b"reload\n"


def socket_of(port: int) -> Path:
    """Where the server of a port listens for its user."""
    return default_books().parent / f"server-{port}.sock"


@asynccontextmanager
async def obeying(port: int, reload: Callable[[], Awaitable[str]]) -> AsyncIterator[None]:
    """Call `reload` when told to, and say what it has said or raised."""
    path, answering = socket_of(port), set[asyncio.Task[None]]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        answering.add(task)
        with suppress(ConnectionError):  # who asked has gone
            try:
                if await reader.readline() == _RELOAD:
                    code, said = await _outcome(reload)
                    writer.write(json.dumps([code, said]).encode() + b"\n")
                    await writer.drain()
            finally:
                answering.discard(task)
                writer.close()
                await writer.wait_closed()

    try:
        listener = _bind(path)
    except OSError as error:  # a home that cannot be written, or of a very long name
        log.warning("pipeline reload cannot reach this server, for %s: %s", path, error)
        yield
        return
    server = await asyncio.start_unix_server(answer, sock=listener)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)


def ask_to_reload(port: int | None) -> str:
    """What the server of a port, or the only one there is, says; PipelineError is its own."""
    with ExitStack() as stack:
        found = _connect(port, stack)
        if not found:
            where = "" if port is None else f" at port {port}"
            raise PipelineError(f"no server of yours runs{where}: pipeline serve starts one")
        if len(found) > 1:
            ports = " or ".join(path.stem.removeprefix("server-") for path in found)
            raise PipelineError(f"several servers of yours run: give --port {ports}")
        [connection] = found.values()
        connection.sendall(_RELOAD)
        with connection.makefile("rb") as answers:
            line = answers.readline()
    if not line:
        raise PipelineError("the server has stopped before it had reloaded")
    code, said = json.loads(line)
    if code:
        error = PipelineError(said)
        error.exit_code = code
        raise error
    return str(said)


async def _outcome(reload: Callable[[], Awaitable[str]]) -> tuple[int, str]:
    try:
        return 0, await reload()
    except PipelineError as error:
        return error.exit_code, str(error)


def _bind(path: Path) -> socket.socket:
    """The port is ours, so a socket that lies there is of a server that was killed."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        path.chmod(0o600)  # before anybody can connect
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _connect(port: int | None, stack: ExitStack) -> dict[Path, socket.socket]:
    """Those servers that answer."""
    one = None if port is None else socket_of(port)
    found: dict[Path, socket.socket] = {}
    for path in [one] if one else sorted(socket_of(0).parent.glob("server-*.sock")):
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        with suppress(OSError):
            connection.connect(str(path))
            found[path] = connection
    return found
