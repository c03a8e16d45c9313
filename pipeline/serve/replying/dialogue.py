"""An order to an engine, phase by phase, and its deltas as what a client is told."""

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace

from pipeline.chat import Chat
from pipeline.engine.protocol import Engine
from pipeline.errors import EngineError
from pipeline.serve.asking.order import Order
from pipeline.serve.replying.events import Event, Tally
from pipeline.serve.replying.phases import Phases
from pipeline.serve.replying.reading import Reading


async def answer(
    order: Order, chat: Chat, engine: Engine, tally: Tally
) -> AsyncGenerator[Event, None]:
    """Drive the engine. Closing this generator, or a stop string in the answer, cancels it.

    `tally` is kept up to date before each event.
    """
    phases, reading = Phases(order, chat), Reading(order, chat, tally)
    phase = phases.first()
    while phase is not None:
        for event in reading.begin(phase):
            yield event
        if reading.outcome is not None:
            break
        num_tokens = min(reading.tokens_left, phase.max_tokens or reading.tokens_left)
        sampling = replace(phase.sampling, max_tokens=num_tokens)
        deltas = engine.generate(reading.prompt_ids, sampling, order.lane)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                for event in reading.read(delta):
                    yield event
                if reading.outcome is not None:
                    break
        if reading.outcome is None:
            raise EngineError("the engine ended its answer without saying why")
        phase = phases.after(reading.outcome)
    yield reading.end()
