"""A text continued as it stands: an engine's deltas as events, with no dialogue read into them."""

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace

from pipeline.engine.protocol import Delta, Engine
from pipeline.errors import EngineError
from pipeline.serve.asking.order import Order
from pipeline.serve.replying.events import Ended, Event, Said, Tally, Usage
from pipeline.serve.replying.meters import TextLogprobs
from pipeline.serve.replying.stops import StopStrings


async def continue_text(order: Order, engine: Engine, tally: Tally) -> AsyncGenerator[Event, None]:
    """Closing this generator, or a stop string, cancels the engine's work.

    `tally` is kept up to date before each event.
    """
    tally.usage = Usage(prompt_tokens=len(order.prompt_ids))
    stops, tokens = StopStrings(order.stops), TextLogprobs()
    deltas = engine.generate(order.prompt_ids, order.sampling, order.lane)
    async with contextlib.aclosing(deltas):
        async for delta in deltas:
            _count(delta, tally)
            tokens.add(delta)
            text = stops.feed(delta.text)
            if delta.finish is not None and not stops.is_met:
                text += stops.finish()
            if text:
                yield Said("answer", text, tokens.of(text))
            if stops.is_met or delta.finish is not None:
                finish = "stop" if stops.is_met or delta.finish is None else delta.finish
                yield Ended(finish, finish, stops.met)
                return
    raise EngineError("the engine ended its text without saying why")


def _count(delta: Delta, tally: Tally) -> None:
    usage = tally.usage
    tally.usage = replace(
        usage,
        completion_tokens=usage.completion_tokens + delta.num_tokens,
        cached_tokens=max(usage.cached_tokens, delta.num_cached_tokens),
    )
