"""A reply on its way to the client: as a stream, or whole."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from pipeline.errors import EngineError
from pipeline.serve.api.exchange import Exchange, HungUp
from pipeline.serve.api.failures import as_request_error
from pipeline.serve.api.record import Record
from pipeline.serve.replying.choices import Indexed
from pipeline.serve.replying.events import Ended, Event, Said
from pipeline.serve.replying.healing import heal
from pipeline.serve.skins.skin import Bill, Body, Writer

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
COMPRESSED, HEALED = "context_compression", "response_healing"


@dataclass(frozen=True)
class Reply:
    """A reply about to be sent."""

    record: Record
    writer: Writer
    headers: dict[str, str]
    metadata: Callable[[Sequence[str]], Body | None]
    """Told which plugins had to act."""
    book: Callable[[], Awaitable[None]]
    """Commits what has been used, before the client is told of it."""
    heals: bool = False
    """Whether the answer is to be JSON, and mended if it is not; not in a stream."""

    def shows(self, event: Event) -> bool:
        """Whether the client is told; hidden reasoning is still counted."""
        hidden = isinstance(event, Said) and event.channel == "reasoning"
        return self.record.answering.shows_reasoning or not hidden

    def bill(self, *stages: str) -> Bill:
        """As things stand."""
        if self.record.answering.is_compressed:
            stages = (COMPRESSED, *stages)
        return Bill(self.record.usage, self.record.cost, self.metadata(stages))


async def send_whole(
    exchange: Exchange, reply: Reply, events: AsyncGenerator[Indexed, None]
) -> None:
    """One body; what breaks off is told with what there was of it."""
    record, stages = reply.record, list[str]()
    told: list[Indexed] = []
    try:
        async for index, event in events:
            if reply.shows(event):
                told.append((index, event))
    except EngineError as error:
        record.error = as_request_error(error)
    if reply.heals and not record.error:
        healed = await asyncio.to_thread(_healed, told)  # rubbish takes long to make sense of
        stages = [HEALED] if healed != told else []
        told = healed
    for index, event in told:
        reply.writer.add(index, event)
    await reply.book()
    body = reply.writer.body(reply.bill(*stages), record.error)
    await exchange.answer(body, 200, reply.headers)


async def send_stream(
    exchange: Exchange, reply: Reply, events: AsyncGenerator[Indexed, None]
) -> None:
    """Each event as it comes. What breaks off is told in the stream, for its status is out."""
    record, writer = reply.record, reply.writer
    if not exchange.is_started:
        await exchange.begin(200, "text/event-stream", {**STREAM_HEADERS, **reply.headers})
    await exchange.write(writer.begin(record.answering.echo or None))
    try:
        async for index, event in events:
            if reply.shows(event):
                await exchange.write(writer.frames(index, event))
        await reply.book()
        end = writer.finish(reply.bill())
    except HungUp:
        raise
    except Exception as error:  # noqa: BLE001 - the stream must say it
        record.error = as_request_error(error)
        end = writer.fail(record.error, reply.bill())
    await exchange.write(end, more=False)


def _healed(told: list[Indexed]) -> list[Indexed]:
    """With the answer of each choice mended; one that was cut off for its length is not."""
    mended: dict[int, str] = {}
    for index in {index for index, event in told if _ends_well(event)}:
        text = "".join(e.text for i, e in told if i == index and _is_answer(e))
        if (whole := heal(text)) is not None:
            mended[index] = whole
    healed: list[Indexed] = []
    for index, event in told:
        if index not in mended or not _is_answer(event):
            healed.append((index, event))
        elif mended[index]:  # all of it where its first bit was
            healed.append((index, Said("answer", mended[index])))
            mended[index] = ""
    return healed


def _ends_well(event: Event) -> bool:
    return isinstance(event, Ended) and event.finish == "stop"


def _is_answer(event: Event) -> TypeGuard[Said]:
    return isinstance(event, Said) and event.channel == "answer"
