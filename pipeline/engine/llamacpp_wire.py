"""llama.cpp's own words: a sampling as the body of its `/completion`, its events as deltas."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.engine.protocol import Delta, Finish, Sampling, TokenLogprob
from pipeline.errors import EngineError

_RANDOM_SEED = 2**32 - 1  # llama.cpp's own word for "draw one"
_LEAST_LOGPROB = -9999.0
"""OpenAI's, for a token that was all but impossible; llama.cpp has a float's least instead."""


def completion_body(
    prompt_ids: Sequence[int], sampling: Sampling, context_tokens: int
) -> dict[str, Any]:
    """Every parameter that changes the output, in llama.cpp's names."""
    seed = _RANDOM_SEED if sampling.seed is None else sampling.seed % _RANDOM_SEED
    top = sampling.top_logprobs
    grammar = sampling.grammar
    return {
        "prompt": list(prompt_ids),
        "cache_prompt": not sampling.is_repeatable,
        "return_tokens": True,
        # So that every event says how much of the prompt was cached, not the last one alone.
        "timings_per_token": True,
        "n_predict": sampling.max_tokens,
        # Only these act, in the order of transformers and vLLM: temperature before the cuts.
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "temperature": sampling.temperature,
        "dynatemp_range": 0.0,
        "mirostat": 0,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "min_keep": 0,
        "repeat_last_n": context_tokens,
        "repeat_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "seed": seed,
        "n_probs": 0 if top is None else max(top, 1),
        "post_sampling_probs": False,
        "n_keep": 0,
        "stop": [token.text for token in sampling.stop_tokens],
        "logit_bias": [[token_id, bias] for token_id, bias in sampling.logit_bias.items()],
        "ignore_eos": False,
        # This line is how it tells llguidance's dialect from its own.
        "grammar": "" if grammar is None else f"%llguidance {{}}\n{grammar}",
    }


class Reading:
    """One continuation's events, taken in order."""

    def __init__(self, sampling: Sampling) -> None:
        self._stops = {token.text: token.id for token in sampling.stop_tokens}
        self._top = sampling.top_logprobs
        self._num_tokens = 0
        # Of tokens without text so far: what ends a continuation, or may turn out to.
        self._held: tuple[list[int], list[TokenLogprob]] = ([], [])

    def read(self, event: Mapping[str, Any]) -> Delta:
        """One event in our words. A character cut in two is held back by llama.cpp itself."""
        try:
            num_before, self._num_tokens = self._num_tokens, int(event["tokens_predicted"])
            ids, logprobs = self._settle(event)
            timings = event.get("timings") or {}
            return Delta(
                text=event["content"],
                num_tokens=self._num_tokens - num_before,
                finish=_finish(event) if event["stop"] else None,
                num_prompt_tokens=int(event["tokens_evaluated"]),
                num_cached_tokens=int(timings.get("cache_n", 0)),
                num_completion_tokens=self._num_tokens,
                ids=tuple(ids),
                logprobs=tuple(logprobs),
                stop_id=self._stops.get(event.get("stopping_word") or ""),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError("llama.cpp answered something that is not a completion") from error

    def _settle(self, event: Mapping[str, Any]) -> tuple[list[int], list[TokenLogprob]]:
        """Whatever is now known to be part of the text."""
        ids = [*self._held[0], *map(int, event.get("tokens") or ())]
        logprobs = [*self._held[1], *(_logprobs(event, self._top))]
        if event["stop"]:
            # A stop's text is that of all that was held; the end of the turn is one token.
            cut = {"word": 0, "eos": -1}.get(str(event.get("stop_type")))
            return ids[:cut], logprobs[:cut]
        if not event["content"]:
            self._held = ids, logprobs
            return [], []
        self._held = [], []
        return ids, logprobs


def _logprobs(event: Mapping[str, Any], top: int | None) -> list[TokenLogprob]:
    if top is None:
        return []
    return [
        TokenLogprob(int(token["id"]), _logprob(token), likeliest(token)[:top])
        for token in event.get("completion_probabilities") or ()
    ]


def likeliest(token: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens at the place of one, by id, with their log-probabilities."""
    return tuple((int(other["id"]), _logprob(other)) for other in token["top_logprobs"])


def _logprob(token: Mapping[str, Any]) -> float:
    return max(float(token["logprob"]), _LEAST_LOGPROB)


def _finish(event: Mapping[str, Any]) -> Finish:
    return "length" if event.get("stop_type") == "limit" else "stop"
