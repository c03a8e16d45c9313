"""A GGUF file's own opinion: llama.cpp asked for the next token at each position."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from pipeline.certify.measure import Position
from pipeline.engine.llamacpp import LlamaCpp

TOP = 256
"""Likeliest tokens asked for; the rest are compared as one."""


def ask_gguf(file: Path, positions: Sequence[Position], log: Path) -> list[dict[int, float]]:
    """Log-probabilities of the likeliest next tokens at each position, in the given order."""
    return asyncio.run(_ask(file, positions, log))


async def _ask(file: Path, positions: Sequence[Position], log: Path) -> list[dict[int, float]]:
    room = max(len(position) for position in positions) + 8
    answers: dict[Position, dict[int, float]] = {}
    async with await LlamaCpp.start(file, slots=1, context_tokens=room, log=log) as engine:
        for position in sorted(positions):  # prefixes follow each other: the cache holds the rest
            answers[position] = await engine.next_token_logprobs(position, TOP)
    return [answers[position] for position in positions]
