"""The port of a server: taken by one process, or shared by several."""

import contextlib
import socket
from collections.abc import Iterator

from pipeline.errors import PipelineError


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Take the port first: a model is not loaded for a port that is not free.

    A port is only taken by listening; two may bind it. A connection waits until we are ready.
    """
    with _socket(host) as listener:
        try:
            listener.bind((host, port))
            listener.listen()
        except (OSError, OverflowError) as error:
            raise PipelineError(
                f"cannot listen on {host}:{port}: {error}; choose another port or host"
            ) from error
        yield listener


@contextlib.contextmanager
def share(host: str, port: int) -> Iterator[socket.socket]:
    """The same for `join`; nobody is let in before somebody has joined."""
    with listen(host, port) as listener:  # which others that share it would not notice
        port = listener.getsockname()[1]
    with join(host, port) as place:
        yield place


@contextlib.contextmanager
def join(host: str, port: int) -> Iterator[socket.socket]:
    """A part of the connections to a port that is shared, once it listens: about as many as others.

    Of a listener that they inherited, one process would take most: it is woken last, and takes all
    that wait.
    """
    with _socket(host) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        place.bind((host, port))
        yield place


def url_of(listener: socket.socket) -> str:
    """What clients are given."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/api/v1"


def _socket(host: str) -> socket.socket:
    # asyncio switches Nagle's delay off only where the protocol is named: 40 ms of every response.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return made
