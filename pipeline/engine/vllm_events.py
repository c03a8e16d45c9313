"""The events of OpenAI's completions dialect, with vLLM's additions, in our words."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pipeline.engine.connection import message
from pipeline.engine.protocol import Delta, Finish, TokenLogprob
from pipeline.errors import EngineError, EngineRefused

_FINISHES: dict[str | None, Finish | None] = {None: None, "stop": "stop", "length": "length"}
_TOKEN = "token_id:"


def read_delta(
    event: Mapping[str, Any], num_before: int, stop_ids: Collection[int], top: int
) -> Delta:
    """One event; a character cut in two is held back by vLLM itself.

    `num_before` tokens came before it. The id of what ended it is in neither ids nor logprobs,
    which have the `top` likeliest tokens.
    """
    try:
        (choice,) = event["choices"]
        finish = _FINISHES[choice.get("finish_reason")]
        ids = choice.get("token_ids") or []
        logprobs = list(_logprobs(choice, top)) if choice.get("logprobs") else []
        usage = event.get("usage") or {}
        num_completion_tokens = usage.get("completion_tokens", num_before + (len(ids) or 1))
        if finish == "stop":
            ids, logprobs = ids[:-1], logprobs[: len(ids) - 1]
        reason = choice.get("stop_reason")
        return Delta(
            text=choice["text"],
            num_tokens=num_completion_tokens - num_before,
            finish=finish,
            num_prompt_tokens=usage.get("prompt_tokens", 0),
            num_completion_tokens=num_completion_tokens,
            ids=tuple(ids),
            logprobs=tuple(logprobs),
            stop_id=reason if finish == "stop" and reason in stop_ids else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError("vLLM answered something that is not a completion") from error


def recount(last: Delta, event: Mapping[str, Any]) -> Delta:
    """The last delta, with the counts of the event after it."""
    usage = event.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    num_completion_tokens = usage.get("completion_tokens", last.num_completion_tokens)
    return last._replace(
        num_tokens=last.num_tokens + num_completion_tokens - last.num_completion_tokens,
        num_completion_tokens=num_completion_tokens,
        num_prompt_tokens=usage.get("prompt_tokens", last.num_prompt_tokens),
        num_cached_tokens=details.get("cached_tokens") or 0,
    )


def read_failure(event: Mapping[str, Any]) -> EngineError:
    """What an event says that ends a stream; some refusals come only then."""
    error = event["error"]
    if isinstance(error, dict) and error.get("code") == 400:
        return EngineRefused(f"vLLM refused: {message(event)}")
    return EngineError(f"vLLM failed: {message(event)}")


def read_likeliest(found: Mapping[str, float], top: int) -> tuple[tuple[int, float], ...]:
    """By id, the likeliest first; the drawn token is there too, and need not be one of them."""
    by_id = ((_id(token), logprob) for token, logprob in found.items())
    return tuple(sorted(by_id, key=lambda pair: -pair[1])[:top])


def _logprobs(choice: Mapping[str, Any], top: int) -> Iterator[TokenLogprob]:
    found = choice["logprobs"]
    columns = (found["tokens"], found["token_logprobs"], found["top_logprobs"])
    for token, logprob, likeliest in zip(*columns, strict=True):
        yield TokenLogprob(_id(token), logprob, read_likeliest(likeliest, top))


def _id(token: str) -> int:
    return int(token.removeprefix(_TOKEN))
