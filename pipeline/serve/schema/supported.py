"""Which request parameters are honoured: what a server may declare of itself."""

from pipeline.engine.protocol import Capability

# Only what is honoured, never what is merely accepted.
_ALWAYS_SUPPORTED = (
    "include_reasoning",
    "max_completion_tokens",
    "max_tokens",
    "parallel_tool_calls",
    "reasoning",
    "reasoning_effort",
    "stop",
    "temperature",
    "tools",
    "top_p",
)
_SUPPORTED_BY: dict[Capability, tuple[str, ...]] = {
    "frequency_penalty": ("frequency_penalty",),
    "grammar": ("response_format", "structured_outputs", "tool_choice"),
    "logit_bias": ("logit_bias",),
    "logprobs": ("logprobs", "top_logprobs"),
    "min_p": ("min_p",),
    "presence_penalty": ("presence_penalty",),
    "repetition_penalty": ("repetition_penalty",),
    "seed": ("seed",),
    "top_k": ("top_k",),
}


PARAMETERS = frozenset(
    [
        *_ALWAYS_SUPPORTED,
        *(name for names in _SUPPORTED_BY.values() for name in names),
        "prediction",
        "top_a",
        "verbosity",
        "web_search_options",
    ]
)
"""All that the public catalogue has a word for."""


def supported_parameters(able: frozenset[Capability]) -> list[str]:
    """What is honoured over an engine that can do this."""
    by_engine = [name for capability in able for name in _SUPPORTED_BY.get(capability, ())]
    return sorted([*_ALWAYS_SUPPORTED, *by_engine])
