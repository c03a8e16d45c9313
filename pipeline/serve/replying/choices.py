"""Several replies to one order, side by side: `n` of the request."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from pipeline.chat import Chat
from pipeline.engine.protocol import Engine
from pipeline.serve.asking.order import Order
from pipeline.serve.replying.continuation import continue_text
from pipeline.serve.replying.dialogue import answer
from pipeline.serve.replying.events import Ended, Event, Tally, Usage

Indexed = tuple[int, Event]


async def answer_all(
    order: Order, chat: Chat, engine: Engine, tallies: Sequence[Tally]
) -> AsyncGenerator[Indexed, None]:
    """The events of every choice, each under its index; the first failure ends all of them.

    There is one tally for each choice.
    """
    if order.num_choices == 1:
        async with contextlib.aclosing(_reply(order, chat, engine, tallies[0])) as events:
            async for event in events:
                yield 0, event
        return
    told: asyncio.Queue[Indexed | BaseException] = asyncio.Queue(maxsize=order.num_choices)
    tasks = [
        asyncio.create_task(
            _tell(told, index, _reply(_numbered(order, index), chat, engine, tally))
        )
        for index, tally in enumerate(tallies)
    ]
    try:
        num_ended = 0
        while num_ended < order.num_choices:
            item = await told.get()
            if isinstance(item, BaseException):
                raise item
            num_ended += isinstance(item[1], Ended)
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _reply(order: Order, chat: Chat, engine: Engine, tally: Tally) -> AsyncGenerator[Event, None]:
    if order.is_raw:
        return continue_text(order, engine, tally)
    return answer(order, chat, engine, tally)


def whole_usage(tallies: Sequence[Tally]) -> Usage:
    """Of all choices: their one prompt counts once."""
    usages = [tally.usage for tally in tallies]
    return Usage(
        prompt_tokens=usages[0].prompt_tokens,
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        cached_tokens=usages[0].cached_tokens,
    )


def _numbered(order: Order, index: int) -> Order:
    """With a seed of its own, or seeded choices would all be the same."""
    seed = order.sampling.seed
    if seed is None:
        return order
    return replace(order, sampling=replace(order.sampling, seed=seed + index))


async def _tell(
    told: "asyncio.Queue[Indexed | BaseException]",
    index: int,
    events: AsyncGenerator[Event, None],
) -> None:
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                await told.put((index, event))
    except Exception as error:  # noqa: BLE001 - it is raised again where the events are read
        await told.put(error)
