"""Our application over an engine in its own process: what of the time is the gateway's alone."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import get_args

from pipeline.bench.gateway_engine import CONTEXT_TOKENS, MODEL
from pipeline.bench.gateway_script import Script, serve_on
from pipeline.chat import CALL, END_THINK, Chat
from pipeline.engine.protocol import PLAIN, Capability, Delta, Lane, Sampling
from pipeline.serve.api.app import App
from pipeline.serve.offer.catalog import Catalog, Served


class Engine:
    """Each token in a turn of the event loop of its own, as if it had come from somewhere."""

    def __init__(self, script: Script) -> None:
        self.context_tokens = CONTEXT_TOKENS
        self.capabilities: frozenset[Capability] = frozenset(get_args(Capability))
        self._script = script

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        lane: Lane = PLAIN,
    ) -> AsyncGenerator[Delta, None]:
        """What the script says."""
        stop_ids = [token.id for token in sampling.stop_tokens]
        part = self._script.part(
            stop_ids, sampling.max_tokens, is_held=sampling.grammar is not None
        )
        num_prompt_tokens = len(prompt_ids)
        for index, text in enumerate(part.texts, start=1):
            await asyncio.sleep(0)
            yield Delta(text, 1, None, num_prompt_tokens, 0, index, (1000,))
        num_more = int(part.finish == "stop")
        num_tokens = len(part.texts) + num_more
        yield Delta(
            "", num_more, part.finish, num_prompt_tokens, 0, num_tokens, stop_id=part.stop_id
        )

    async def next_token_logprobs(self, prompt_ids: Sequence[int], top: int) -> dict[int, float]:
        """Nobody asks for them here."""
        raise NotImplementedError

    async def is_healthy(self) -> bool:
        """Always."""
        return True

    async def close(self) -> None:
        """There is nothing to close."""


if __name__ == "__main__":
    chat = Chat(Path(sys.argv[2]))
    engine = Engine(Script(chat.token_id(END_THINK), chat.token_id(CALL)))
    serve_on(int(sys.argv[1]), App(Catalog([Served(MODEL, chat, engine, 1767225600)])))
