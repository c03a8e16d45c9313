"""A real uvicorn in front of an application, in a thread of the test's own process."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from pipeline.serve.api.app import App
from pipeline.serve.gateway import configure


@contextmanager
def running(app: App) -> Iterator[str]:
    """Its address."""
    server = uvicorn.Server(configure(app))

    async def serve() -> None:
        try:
            await server.serve([listener])
        finally:
            await app.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        # asyncio sets it only on sockets made as TCP's; without it every answer takes 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port = listener.getsockname()[1]
        runner = threading.Thread(target=lambda: asyncio.run(serve()))
        runner.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            runner.join()
