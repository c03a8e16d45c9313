"""The engine over llama.cpp's server: our own child process, or a URL somebody else runs."""

import asyncio
import contextlib
import importlib.util
import re
import sys
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.engine.child import Child
from pipeline.engine.connection import Connection, message
from pipeline.engine.hosted import Hosted
from pipeline.engine.llamacpp_wire import Reading, completion_body, likeliest
from pipeline.engine.protocol import PLAIN, Capability, Delta, Lane, Sampling
from pipeline.engine.slots import Slots
from pipeline.errors import EngineError

START_TIMEOUT_S = 600
"""Loading a large file from a slow disk takes minutes; a child that dies is noticed at once."""
_CAPABILITIES: frozenset[Capability] = frozenset(
    [
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "top_k",
        "min_p",
        "seed",
        "logit_bias",
        "logprobs",
        "grammar",
    ]
)
_REFUSED = re.compile(r"lora adapter: (.*)\n.*failed to load lora adapter '(.*)'")


class LlamaCpp(Hosted):
    """One model in llama.cpp's server, spoken to over its own `/completion` route.

    The end token is counted in `num_tokens` and `num_completion_tokens`, and is in no text.
    Repetition, frequency and presence penalties look at the whole context, the prompt included.
    A grammar that its llguidance refuses constrains nothing: check it before.
    Use `async with await LlamaCpp.start(...)`, or call `close`.
    """

    route = "/completion"

    def __init__(self, connection: Connection, adapters: Iterable[str | None] = ()) -> None:
        """Not for callers: `start` and `at` also wait until the server answers."""
        super().__init__(connection)
        self.context_tokens = 0
        self._slots = Slots(1)
        self._adapters = tuple(adapters)
        """In llama.cpp's order."""
        self.capabilities = _CAPABILITIES
        if any(self._adapters):
            self.capabilities |= {"adapters"}

    @classmethod
    async def start(
        cls,
        gguf: Path,
        *,
        slots: int,
        context_tokens: int,
        log: Path,
        adapter: Path | None = None,
        adapters: Mapping[str, Path] | None = None,
    ) -> "LlamaCpp":
        """Serve a GGUF file in a child process that ends with this one; wait until it is ready.

        `slots` requests run at once, each with room for `context_tokens`, or for as many as the
        model has been trained on if these are fewer. What the child says goes to `log`. `adapters`
        are LoRA adapters as GGUF, by the names that a Lane chooses them by; `adapter` is put on the
        base where a Lane names none. EngineError for one that does not fit this very model.
        """
        loras = ({None: adapter} if adapter else {}) | dict(adapters or {})
        for file in (gguf, *loras.values()):
            if not file.is_file():
                raise EngineError(f"{file} is missing: llama.cpp needs a GGUF file")
        if importlib.util.find_spec("xllamacpp") is None:
            raise EngineError("llama.cpp is not installed: run pip install '.[serve]'")

        def command(socket: Path) -> list[str]:
            words = [sys.executable, "-m", "pipeline.engine.llamacpp_child"]
            words += ["--gguf", str(gguf.resolve()), "--socket", str(socket)]
            words += ["--slots", str(slots), "--context-tokens", str(context_tokens)]
            return words + [f"--adapter={file.resolve()}" for file in loras.values()]

        child = await Child.start("llamacpp", command, log)
        engine = cls(Connection("llama.cpp", "http://llama.cpp", child), loras)
        try:
            await asyncio.wait_for(engine._wait_until_healthy(child), START_TIMEOUT_S)
            await engine._read_properties()
        except BaseException as error:
            child.kill()
            await engine.close()
            if isinstance(error, TimeoutError):
                what = f"llama.cpp did not load {gguf} within {START_TIMEOUT_S} s; see {log}"
                raise EngineError(what) from error
            raise
        return engine

    @classmethod
    async def join(
        cls, socket: Path, adapters: Iterable[str], part: int = 0, num_parts: int = 1
    ) -> "LlamaCpp":
        """Speak to what another process of ours has started, with these adapters.

        Of several that do, each has a part of its slots.
        """
        engine = cls(Connection("llama.cpp", "http://llama.cpp", socket), adapters)
        try:
            await engine._read_properties(part, num_parts)
        except BaseException:
            await engine.close()
            raise
        return engine

    @classmethod
    async def at(cls, url: str, api_key: str = "", part: int = 0, num_parts: int = 1) -> "LlamaCpp":
        """Speak to a llama.cpp server somebody else runs, such as http://127.0.0.1:8080.

        Of several processes of ours that do, each has a part of its slots.
        """
        engine = cls(Connection("llama.cpp", url, api_key=api_key))
        try:
            await engine._read_properties(part, num_parts)
        except BaseException:
            await engine.close()
            raise
        return engine

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, lane: Lane = PLAIN
    ) -> AsyncGenerator[Delta, None]:
        """Continue a prompt; closing the generator cancels, within one batch of the engine.

        What a lane with a salt leaves in the engine's cache is for lanes with that salt alone.
        """
        body = self.body(prompt_ids, sampling, lane)
        if not lane.cache_salt:
            async with contextlib.aclosing(self._continue(body, sampling)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        owner = (lane.cache_salt, lane.adapter)
        async with self._slots.taken(owner, prompt_ids) as (number, may_go_on):
            body |= {"id_slot": number, "cache_prompt": body["cache_prompt"] and may_go_on}
            async with contextlib.aclosing(self._continue(body, sampling)) as deltas:
                async for delta in deltas:
                    yield delta

    async def _continue(
        self, body: Mapping[str, Any], sampling: Sampling
    ) -> AsyncGenerator[Delta, None]:
        reading = Reading(sampling)
        events = self.connection.events(self.route, body)
        async with contextlib.aclosing(events):
            async for event in events:
                if "error" in event:
                    raise EngineError(f"llama.cpp failed: {message(event)}")
                delta = reading.read(event)
                yield delta
                if delta.finish is not None:
                    return
        raise self.connection.died("ended its answer too early")

    async def next_token_logprobs(
        self, prompt_ids: Sequence[int], top: int, *, is_repeatable: bool = False
    ) -> dict[int, float]:
        """From the softmax over all logits: no temperature, penalty or cut touches them.

        `is_repeatable` is that of a Sampling.
        """
        sampling = Sampling(
            max_tokens=1, temperature=0.0, top_logprobs=top, is_repeatable=is_repeatable
        )
        body = {
            **self.body(prompt_ids, sampling),
            "stream": False,
            # llama.cpp keeps a token and its probabilities to itself while its text is part of a
            # character, so it is made to choose another; the probabilities are from before that.
            "grammar": 'root ::= "a"',
        }
        answer = await self.connection.post(self.route, body)
        try:
            return dict(likeliest(answer["completion_probabilities"][0]))
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError("llama.cpp gave no log-probabilities") from error

    async def is_healthy(self) -> bool:
        """Whether the server answers and has its model loaded."""
        return await self.connection.answers("/health")

    def body(
        self, prompt_ids: Sequence[int], sampling: Sampling, lane: Lane = PLAIN
    ) -> dict[str, Any]:
        """What `generate` sends to `route`."""
        if lane.adapter is not None and lane.adapter not in self._adapters:
            raise EngineError(f"llama.cpp has no adapter {lane.adapter}")
        body = completion_body(prompt_ids, sampling, self.context_tokens) | {"stream": True}
        # All of them, those that are off, too: from a request that names none llama.cpp would not
        # see that the adapter has changed, and go on from what another has made of the prompt.
        scales = [
            {"id": index, "scale": float(name == lane.adapter)}
            for index, name in enumerate(self._adapters)
        ]
        return body | {"lora": scales} if scales else body

    async def _wait_until_healthy(self, child: Child) -> None:
        while not await self.is_healthy():
            if child.is_gone:
                raise EngineError(_why_gone(child.log))
            await asyncio.sleep(0.05)

    async def _read_properties(self, part: int = 0, num_parts: int = 1) -> None:
        """How many slots there are, and how many tokens one holds."""
        answer = await self.connection.get("/props")
        try:
            self.context_tokens = int(answer["default_generation_settings"]["n_ctx"])
            self._slots = Slots(int(answer.get("total_slots", 1)), part, num_parts)
        except (KeyError, TypeError, ValueError) as error:
            url = self.connection.url
            raise EngineError(f"{url} does not answer like llama.cpp's server") from error


def _why_gone(log: Path) -> str:
    """One sentence for a child that ended before it was ready, from what it has said."""
    refused = _REFUSED.search(log.read_text(encoding="utf-8", errors="replace"))
    what = "did not start"
    if refused:
        what = f"does not take the adapter {refused[2]} for this model: {refused[1]}"
    return f"llama.cpp {what}; see {log}"
