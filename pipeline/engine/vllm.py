"""The engine over vLLM's server, or over any that speaks OpenAI's completions dialect at a URL."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pipeline.engine.child import Child
from pipeline.engine.connection import Connection, message
from pipeline.engine.hosted import Hosted
from pipeline.engine.protocol import PLAIN, Capability, Delta, Lane, Sampling
from pipeline.engine.vllm_events import read_delta, read_failure, read_likeliest, recount
from pipeline.engine.vllm_launch import (
    BASE_NAME,
    end_ids,
    environment,
    find_python,
    launch_words,
    why_gone,
)
from pipeline.errors import EngineError

START_TIMEOUT_S = 1800
"""Compiling kernels for a large model takes many minutes; a child that dies is noticed at once."""
_CHILD = Path(__file__).with_name("vllm_child.py")
_MODELS = "/v1/models"
_IDLE_S = 2.0  # uvicorn, which vLLM and its like run on, keeps a connection for 5; 0.3 ms each
_LEAST_TOP_P = 1e-6  # vLLM refuses 0, which leaves the likeliest token, as this does
# By this a vLLM that may choose knows which of its engines of grammars is meant.
_LLGUIDANCE = "%llguidance {}\n"
_ALL = frozenset(get_args(Capability))
_VLLMS_OWN = {"seed", "grammar", "logprobs", "adapters", "cache_salt", "priority"}


class Vllm(Hosted):
    """One model and its adapters in vLLM's server, continued over `/v1/completions`.

    Penalties for frequency and presence look at the completion, those for repetition at the prompt
    too. Log-probabilities under a grammar are of what the grammar allows. Use `async with await
    Vllm.start(...)`, or call `close`.
    """

    route = "/v1/completions"

    def __init__(self, connection: Connection, model: str, ends: Sequence[int] = ()) -> None:
        """Not for callers: `start` and `at` also wait until the server answers."""
        super().__init__(connection)
        self.context_tokens = 0
        self.capabilities: frozenset[Capability] = _ALL
        self._model = model
        self._ends = tuple(ends)

    @classmethod
    async def start(
        cls,
        model: Path,
        *,
        slots: int,
        context_tokens: int | None,
        log: Path,
        adapters: Mapping[str, Path] | None = None,
        options: Sequence[str] = (),
    ) -> "Vllm":
        """Serve a checkpoint in a child process that ends with this one; wait until it is ready.

        `slots` requests run at once, each with room for `context_tokens`, or for as many as the
        model has positions if these are fewer or it is None. What the child says goes to `log`.
        `adapters` are PEFT's folders by name. `options` are more words for `vllm serve`, which win:
        --enable-lora and --max-lora-rank where the first adapter is loaded later.
        """
        words = [*launch_words(model, slots, context_tokens, adapters or {}), *options]
        python = find_python()

        def command(socket: Path) -> list[str]:
            return [str(python), str(_CHILD), str(socket), *words]

        child = await Child.start("vllm", command, log, environment())
        connection = Connection("vLLM", "http://vllm", child, idle_s=_IDLE_S)
        engine = cls(connection, BASE_NAME, end_ids(model))
        if "--enable-lora" not in words:
            engine.capabilities -= {"adapters"}
        try:
            await asyncio.wait_for(engine._wait_until_healthy(child), START_TIMEOUT_S)
            await engine._read_model()
        except BaseException as error:
            await engine.close()
            if isinstance(error, TimeoutError):
                what = f"vLLM did not load {model} within {START_TIMEOUT_S} s; see {log}"
                raise EngineError(what) from error
            raise
        return engine

    @classmethod
    async def join(cls, socket: Path, model: Path, adapters: Collection[str]) -> "Vllm":
        """Speak to what another process of ours has started over this checkpoint and these."""
        connection = Connection("vLLM", "http://vllm", socket, idle_s=_IDLE_S)
        engine = cls(connection, BASE_NAME, end_ids(model))
        if not adapters:
            engine.capabilities -= {"adapters"}
        try:
            await engine._read_model()
        except BaseException:
            await engine.close()
            raise
        return engine

    @classmethod
    async def at(cls, url: str, api_key: str = "", model: str = "") -> "Vllm":
        """Speak to a server somebody else runs, such as http://127.0.0.1:8000.

        `model` is one of those it lists; without it the first that is no adapter.
        """
        engine = cls(Connection("the engine", url, api_key=api_key, idle_s=_IDLE_S), model)
        try:
            await engine._read_model()
        except BaseException:
            await engine.close()
            raise
        return engine

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, lane: Lane = PLAIN
    ) -> AsyncGenerator[Delta, None]:
        """Continue a prompt; closing the generator cancels, within one step of the engine."""
        stop_ids = {token.id for token in sampling.stop_tokens}
        last, num_tokens = None, 0
        events = self.connection.events(self.route, self.body(prompt_ids, sampling, lane))
        async with contextlib.aclosing(events):
            async for event in events:
                if "error" in event:
                    raise read_failure(event)
                if not event.get("choices"):  # the exact counts, which follow the last choice
                    last = last and recount(last, event)
                    continue
                delta = read_delta(event, num_tokens, stop_ids, sampling.top_logprobs or 0)
                num_tokens = delta.num_completion_tokens
                if delta.finish is None:
                    yield delta
                else:
                    last = delta
        if last is None:
            raise self.connection.died("ended its answer too early")
        yield last

    async def next_token_logprobs(self, prompt_ids: Sequence[int], top: int) -> dict[int, float]:
        """From the softmax over all logits: no temperature, penalty or cut touches them."""
        sampling = Sampling(max_tokens=1, temperature=0.0, top_logprobs=top)
        body = self.body(prompt_ids, sampling)
        del body["stream_options"]
        answer = await self.connection.post(self.route, body | {"stream": False})
        try:
            return dict(read_likeliest(answer["choices"][0]["logprobs"]["top_logprobs"][0], top))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError("vLLM gave no log-probabilities") from error

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Have an adapter ready under a name; EngineError if vLLM does not take it.

        Another adapter under a name used before must lie in another folder: vLLM's cache of
        prompts goes by both.
        """
        body = {"lora_name": name, "lora_path": str(folder.resolve())}
        await self.connection.tell("/v1/load_lora_adapter", body)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; what runs with it goes on."""
        await self.connection.tell("/v1/unload_lora_adapter", {"lora_name": name})

    async def is_healthy(self) -> bool:
        """Whether the server answers and has its model loaded."""
        path = _MODELS if self.connection.is_elsewhere else "/health"
        return await self.connection.answers(path)

    def body(
        self, prompt_ids: Sequence[int], sampling: Sampling, lane: Lane = PLAIN
    ) -> dict[str, Any]:
        """Every parameter that changes the output, in vLLM's names."""
        stop_ids = [token.id for token in sampling.stop_tokens]
        salt = uuid.uuid4().hex if sampling.is_repeatable else lane.cache_salt
        body: dict[str, Any] = {
            "model": lane.adapter or self._model,
            "prompt": list(prompt_ids),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p or _LEAST_TOP_P,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": None if sampling.seed is None else sampling.seed % 2**63,
            "logit_bias": {str(id): bias for id, bias in sampling.logit_bias.items()} or None,
            "logprobs": sampling.top_logprobs,
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "stop": [],
            "stop_token_ids": [*stop_ids, *self._ends],
            "ignore_eos": False,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        # Servers that know nothing of these refuse them, so they are sent only where they act.
        grammar = sampling.grammar and {"grammar": f"{_LLGUIDANCE}{sampling.grammar}"}
        acting = {
            "structured_outputs": grammar,
            "priority": lane.priority,
            "cache_salt": salt,
        }
        return body | {name: value for name, value in acting.items() if value}

    async def _wait_until_healthy(self, child: Child) -> None:
        while not await self.is_healthy():
            if child.is_gone:
                raise EngineError(why_gone(child.log))
            await asyncio.sleep(0.2)

    async def _read_model(self) -> None:
        """Its name, context and, by who made the server, what acts."""
        answer = await self.connection.get(_MODELS)
        url = self.connection.url
        if "error" in answer:
            raise EngineError(f"{url} refused: {message(answer)}")
        try:
            found = {card["id"]: card for card in answer["data"] if not card.get("parent")}
            card = found[self._model or next(iter(found))]
            self._model, self.context_tokens = card["id"], int(card["max_model_len"])
        except (KeyError, StopIteration, TypeError, ValueError, AttributeError) as error:
            what = f"model {self._model}" if self._model else "a model"
            raise EngineError(f"{url}{_MODELS} does not list {what} with max_model_len") from error
        if self.connection.is_elsewhere:
            is_vllm = card.get("owned_by") == "vllm"
            self.capabilities -= {"priority"} if is_vllm else _VLLMS_OWN
