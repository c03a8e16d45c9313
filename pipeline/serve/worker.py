"""A process of `pipeline serve --workers`: it answers over engines that its parent has started."""

import asyncio
import contextlib
import functools
import pickle
import socket
from collections.abc import AsyncIterator, Set
from dataclasses import replace
from typing import Any

import orjson
import uvloop

from pipeline.errors import PipelineError
from pipeline.serve.crew import Post
from pipeline.serve.gateway import Gateway, Running, doing
from pipeline.serve.listening import join
from pipeline.serve.monitoring.pages import Pages
from pipeline.serve.offer.engines import join_engine
from pipeline.serve.offer.fleet import Fleet
from pipeline.serve.server import check, opened


def work(line: socket.socket) -> None:
    """Answer until a signal comes, or the line to the parent breaks."""
    post = _read_post(line)
    menu = check(post.path, post.settings)
    with (
        join(post.settings.host, post.port) as listener,
        opened(post.path, post.settings, menu) as gateway,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(gateway, post, listener, line))


def _read_post(line: socket.socket) -> Post:
    text = b""
    while not text.endswith(b"\n"):
        text += line.recv(2**16)
    post = pickle.loads(bytes.fromhex(text.decode()))
    assert isinstance(post, Post)
    return post


async def _serve(
    gateway: Gateway, post: Post, listener: socket.socket, line: socket.socket
) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=line)
    pages = Pages(post.folder, f"worker-{post.number}")
    start = functools.partial(
        join_engine, links=post.folder, part=post.number, num_parts=post.settings.workers
    )
    fleet = Fleet(start, post.settings.workers)

    @contextlib.asynccontextmanager
    async def alongside(running: Running) -> AsyncIterator[None]:
        app = running.app
        page = functools.partial(app.metrics.page, app.catalog, app.ledger)
        async with doing(_obey(running, reader, writer)), doing(pages.keep(page)):
            _say(writer, "ready", 0)
            yield

    await replace(gateway, pages=pages).run(listener, fleet, alongside)
    writer.close()


async def _obey(
    running: Running, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """A line is the number of a wish to read the models again; the end of lines is a signal."""
    waiting: set[asyncio.Task[None]] = set()
    async for line in reader:
        number, failure = int(line), None
        try:
            await running.offering.reload()
        except PipelineError as error:
            failure = str(error)
        begun = set(running.requests)
        _say(writer, "read", number, failure)
        over = asyncio.create_task(_say_over(writer, number, begun))
        waiting.add(over)
        over.add_done_callback(waiting.discard)
    running.stop.begin()


async def _say_over(
    writer: asyncio.StreamWriter, number: int, requests: Set[asyncio.Task[Any]]
) -> None:
    """Once replies that may have begun with the models of before have ended."""
    if requests:
        await asyncio.wait(requests)
    _say(writer, "over", number)


def _say(writer: asyncio.StreamWriter, what: str, number: int, failure: str | None = None) -> None:
    writer.write(orjson.dumps([what, number, failure]) + b"\n")
