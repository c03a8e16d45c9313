"""Prompts that wait at the same moment are tokenised together, beside the event loop."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.chat import Chat

MAX_PROMPTS = 16
"""Of one call: of many that come at once, the first ones' tokens do not wait for the last one."""


@dataclass(frozen=True, eq=False)
class _Waiting:
    chat: Chat
    texts: Sequence[str]
    ids: "asyncio.Future[list[int]]"


class BatchTokenizer:
    """One call for those that wait, as soon as the one before is over.

    A thread for each prompt would need the GIL twice, and wait for it while the loop is busy, which
    is when many prompts come at once. The loop's own threads may be at long work: this has its own.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._waiting: list[_Waiting] = []
        self._working: asyncio.Task[None] | None = None

    async def encode(self, chat: Chat, texts: Sequence[str]) -> list[int]:
        """The ids of all these texts, each as by `Chat.encode`."""
        waiting = _Waiting(chat, texts, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        return await waiting.ids

    async def _work(self) -> None:
        try:
            while self._waiting:
                chat = self._waiting[0].chat
                batch = [asked for asked in self._waiting if asked.chat is chat][:MAX_PROMPTS]
                self._waiting = [asked for asked in self._waiting if asked not in batch]
                await self._tell(chat, batch)
        finally:
            self._working = None

    async def _tell(self, chat: Chat, batch: Sequence[_Waiting]) -> None:
        """Each its ids, or why there are none."""
        loop = asyncio.get_running_loop()
        texts = [text for waiting in batch for text in waiting.texts]
        try:
            found = iter(await loop.run_in_executor(self._thread, chat.encode_all, texts))
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.ids.cancel()
            raise
        except BaseException as error:  # noqa: BLE001 - a panic of Rust's is no Exception
            for waiting in batch:
                failure = RuntimeError("the tokenizer has failed")
                failure.__cause__ = error
                if not waiting.ids.done():
                    waiting.ids.set_exception(failure)
            return
        for waiting in batch:
            ids = [i for _ in waiting.texts for i in next(found)]
            if not waiting.ids.done():  # its client may have hung up
                waiting.ids.set_result(ids)
