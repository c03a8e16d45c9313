"""What stages and server ask of an inference engine: raw continuations of token ids."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from pipeline.chat import Mode

Finish = Literal["stop", "length"]
Capability = Literal[
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "top_k",
    "min_p",
    "seed",
    "logit_bias",
    "logprobs",
    "grammar",
    "adapters",
    "priority",
    "cache_salt",
]
"""What not every engine can do; each is a field of Sampling or Lane, or several."""
# Qwen's own recommendation for each mode: fields of a Sampling.
RECOMMENDED: dict[Mode, dict[str, Any]] = {
    "thinking": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0},
    "direct": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0},
}


@dataclass(frozen=True)
class StopToken:
    """A token that ends a continuation: vLLM goes by its id, llama.cpp by its text."""

    id: int
    text: str


@dataclass(frozen=True)
class Sampling:
    """How a continuation is drawn. Every value is sent to the engine: no engine's own defaults."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids."""
    stop_tokens: tuple[StopToken, ...] = ()
    """Beside the end of the turn, which every continuation ends at."""
    grammar: str | None = None
    """What the whole continuation must match, in llguidance's dialect of Lark; it then ends."""
    top_logprobs: int | None = None
    """None asks for no log-probabilities, n for the drawn token's and those of the n likeliest."""
    is_repeatable: bool = False
    """Compute the whole prompt anew: what is left in the engine's cache of earlier prompts is
    rounded differently, so a reply would depend on what was asked before it."""


@dataclass(frozen=True)
class Lane:
    """On whose behalf a continuation runs."""

    adapter: str | None = None
    """Name of the LoRA adapter that is put on the base; None is the base as it was loaded."""
    priority: int = 0
    """The lower, the sooner."""
    cache_salt: str = ""
    """Only requests of the same salt share what is cached of their prompts."""
    session: str = ""
    """Of several engines, requests of one session go to the same, whatever they begin with."""


PLAIN = Lane()


@dataclass(frozen=True)
class TokenLogprob:
    """A drawn token's natural log-probability, before temperature, penalties and cuts."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its place, by id, the likeliest first."""


class Delta(NamedTuple):
    """The next bit of a continuation; the last one carries `finish` and the counts.

    One is made for every token, and a tuple in a third of the time of a frozen dataclass.
    """

    text: str = ""
    """Whole characters only; control tokens other than what ended it are visible."""
    num_tokens: int = 0
    """How many tokens this bit is made of; the end of the turn or a stop token is one of them."""
    finish: Finish | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompt's tokens, how many the engine had in its cache."""
    num_completion_tokens: int = 0
    """So far; the end of the turn or a stop token is one of them."""
    ids: tuple[int, ...] = ()
    """Of the text's tokens, without what ended it; llama.cpp leaves out the first tokens of a
    character that is made of several."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the same tokens, if asked for."""
    stop_id: int | None = None
    """With `finish`: the stop token that ended it; None is the end of the turn, or the length."""


class Engine(Protocol):
    """A served model. `generate` is an async generator: closing it cancels the generation."""

    @property
    def context_tokens(self) -> int:
        """Prompt and completion together may be this long."""
        ...

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What acts. The caller refuses, or names as ignored, what is not in here."""
        ...

    def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, lane: Lane = PLAIN
    ) -> AsyncGenerator[Delta, None]:
        """Continue a prompt; whoever may leave early does so under `contextlib.aclosing`.

        Raises EngineError if the engine dies or answers rubbish.
        """
        ...

    async def next_token_logprobs(self, prompt_ids: Sequence[int], top: int) -> dict[int, float]:
        """Natural log-probabilities of the `top` likeliest next tokens, by id."""
        ...

    async def is_healthy(self) -> bool:
        """Whether the engine answers."""
        ...

    async def close(self) -> None:
        """Let go of connections and, if it is ours, end the process."""
        ...
