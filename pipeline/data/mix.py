"""Chance by content: what the seed decides about a conversation, wherever it stands."""

import hashlib
import json
from typing import Any


def draw(seed: int, what: str, content: Any) -> float:
    """A number in [0, 1) that a seed, a purpose and a JSON-like content decide."""
    text = json.dumps([seed, what, content], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
