"""llama.cpp's own server on a port, as somebody else would run it."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_PROGRAM = """
import sys, threading, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.hostnames, parameters.port = ["127.0.0.1"], int(sys.argv[2])
parameters.n_ctx, parameters.n_parallel, parameters.ui = 512, 1, False
server = xllamacpp.Server(parameters)
sys.stdout.write("ready\\n")
sys.stdout.flush()
threading.Event().wait()
"""


@contextlib.contextmanager
def llamacpp_at(port: int, gguf: Path) -> Iterator[subprocess.Popen[str]]:
    """Ready when it is given."""
    command = [sys.executable, "-c", _PROGRAM, str(gguf), str(port)]
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdout=pipe, stderr=none, text=True) as process:
        try:
            assert process.stdout is not None
            while process.stdout.readline() != "ready\n":
                assert process.poll() is None
            yield process
        finally:
            process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
