"""The one test double: an engine that says what it was told to say."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from pipeline.engine.protocol import Delta, Finish, Sampling
from pipeline.errors import EngineError


class ScriptedEngine:
    """Each chunk is one delta of one token; what it was asked and whether it was closed is kept."""

    def __init__(
        self,
        chunks: Sequence[str] = ("hello",),
        *,
        finish: Finish = "stop",
        fails_at: int | None = None,
        delay_s: float = 0.0,
    ) -> None:
        self.context_tokens = 1000
        self.asked: list[tuple[list[int], Sampling]] = []
        self.num_open = 0
        self.num_given = 0
        self.is_closed = False
        self.chunks = list(chunks)
        self.finish = finish
        self.fails_at = fails_at
        self.delay_s = delay_s

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Delta, None]:
        self.asked.append((list(prompt_ids), sampling))
        self.num_open += 1
        try:
            for index, chunk in enumerate(self.chunks):
                if index == self.fails_at:
                    raise EngineError("the scripted engine has died")
                await asyncio.sleep(self.delay_s)
                self.num_given += 1
                yield Delta(chunk, 1, None, len(prompt_ids), 3, index + 1)
            if self.fails_at == len(self.chunks):
                raise EngineError("the scripted engine has died")
            num_tokens = len(self.chunks) + 1
            yield Delta("", 1, self.finish, len(prompt_ids), 3, num_tokens)
        finally:
            self.num_open -= 1

    async def next_token_logprobs(self, prompt_ids: Sequence[int], top: int) -> dict[int, float]:
        return dict.fromkeys(list(prompt_ids)[:top], -1.0)

    async def is_healthy(self) -> bool:
        return not self.is_closed

    async def close(self) -> None:
        self.is_closed = True
