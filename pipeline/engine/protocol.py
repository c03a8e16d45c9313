"""What stages and server ask of an inference engine: raw continuations of token ids."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pipeline.chat import Mode

Finish = Literal["stop", "length"]
# Qwen's own recommendation for each mode: fields of a Sampling.
RECOMMENDED: dict[Mode, dict[str, Any]] = {
    "thinking": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0},
    "direct": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0},
}


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
    is_repeatable: bool = False
    """Compute the whole prompt anew: what is left in the engine's cache of earlier prompts is
    rounded differently, so a reply would depend on what was asked before it."""


@dataclass(frozen=True)
class Delta:
    """The next bit of a continuation; the last one carries `finish` and the counts."""

    text: str = ""
    """Whole characters only; control tokens other than the end of the turn are visible."""
    num_tokens: int = 0
    """How many tokens this bit is made of."""
    finish: Finish | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompt's tokens, how many the engine had in its cache."""
    num_completion_tokens: int = 0
    """So far; the end of the turn is one of them."""


class Engine(Protocol):
    """A served model. `generate` is an async generator: closing it cancels the generation."""

    context_tokens: int
    """Prompt and completion together may be this long."""

    def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling
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
