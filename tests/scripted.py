"""The one test double: an engine that says what it was told to say."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from pipeline.engine.protocol import (
    PLAIN,
    Capability,
    Delta,
    Finish,
    Lane,
    Sampling,
    TokenLogprob,
)
from pipeline.errors import EngineError


class ScriptedEngine:
    """Each chunk is one delta of one token; what it was asked and whether it was closed is kept.

    A chunk that is a stop token's text ends the continuation, and so do `max_tokens`; whoever asks
    to continue what was said so far is told the rest.
    """

    def __init__(
        self,
        chunks: Sequence[str] = ("hello",),
        *,
        finish: Finish = "stop",
        fails_at: int | None = None,
        delay_s: float = 0.0,
        able: Sequence[Capability] = (),
    ) -> None:
        self.context_tokens = 1000
        self.capabilities: frozenset[Capability] = frozenset(able)
        self.asked: list[tuple[list[int], Sampling]] = []
        self.lanes: list[Lane] = []
        self.num_open = 0
        self.num_given = 0
        self.is_closed = False
        self.chunks = list(chunks)
        self.finish = finish
        self.fails_at = fails_at
        self.fails_after_s = 0.0
        self.delay_s = delay_s
        self._stopped: list[tuple[list[int], int]] = []

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, lane: Lane = PLAIN
    ) -> AsyncGenerator[Delta, None]:
        self.asked.append((list(prompt_ids), sampling))
        self.lanes.append(lane)
        self.num_open += 1
        try:
            async for delta in self._say(list(prompt_ids), sampling):
                self.num_given += delta.finish is None
                yield delta
        finally:
            self.num_open -= 1

    async def _say(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[Delta, None]:
        stops = {stop.text: stop.id for stop in sampling.stop_tokens}
        begin = self._place(prompt_ids)
        for index in range(begin, len(self.chunks)):
            if index == self.fails_at:
                await asyncio.sleep(self.fails_after_s)
                raise EngineError("the scripted engine has died")
            await asyncio.sleep(self.delay_s)
            chunk, num_tokens = self.chunks[index], index + 1 - begin
            counts = (len(prompt_ids), 3, num_tokens)
            if chunk in stops:
                self._stopped.append((prompt_ids, index + 1))
                yield Delta("", 1, "stop", *counts, stop_id=stops[chunk])
                return
            wanted = sampling.top_logprobs is not None
            logprobs = (TokenLogprob(index, -0.5, ((index, -0.5),)),) if wanted else ()
            yield Delta(chunk, 1, None, *counts, logprobs=logprobs)
            if num_tokens == sampling.max_tokens:
                self._stopped.append((prompt_ids, index + 1))
                yield Delta("", 0, "length", *counts)
                return
        if self.fails_at == len(self.chunks):
            raise EngineError("the scripted engine has died")
        yield Delta("", 1, self.finish, len(prompt_ids), 3, len(self.chunks) + 1 - begin)

    def _place(self, prompt_ids: list[int]) -> int:
        """Where the script goes on after this prompt; what was stopped is continued once."""
        for stopped in self._stopped:
            prompt, place = stopped
            if len(prompt) < len(prompt_ids) and prompt_ids[: len(prompt)] == prompt:
                self._stopped.remove(stopped)
                return place
        return 0

    async def next_token_logprobs(self, prompt_ids: Sequence[int], top: int) -> dict[int, float]:
        return dict.fromkeys(list(prompt_ids)[:top], -1.0)

    async def is_healthy(self) -> bool:
        return not self.is_closed

    async def close(self) -> None:
        self.is_closed = True
