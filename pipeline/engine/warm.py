"""The first tokens of an engine, before anybody waits for them."""

from collections.abc import Sequence
from dataclasses import replace

from pipeline.engine.protocol import PLAIN, Engine, Lane, Sampling


async def warm(engine: Engine, prompt_ids: Sequence[int], adapters: Sequence[str] = ()) -> None:
    """One token on every path, so that no client pays for what an engine does once."""
    plain = Sampling(max_tokens=1, temperature=0.0)
    paths = [(plain, PLAIN)]
    if "logprobs" in engine.capabilities:
        paths.append((replace(plain, top_logprobs=1), PLAIN))
    if "grammar" in engine.capabilities:
        paths.append((replace(plain, grammar='start: "a"'), PLAIN))
    if "adapters" in engine.capabilities:
        paths += [(plain, Lane(adapter=adapter)) for adapter in adapters]
    for sampling, lane in paths:
        async for _ in engine.generate(prompt_ids, sampling, lane):
            pass
