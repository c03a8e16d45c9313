"""One line of the log for each reply: never a word of it, and never a key."""

import logging

from pipeline.serve.books.keys import Key
from pipeline.serve.books.ledger import Generation

log = logging.getLogger(__name__)

_FIELDS = (
    *("model", "provider", "engine", "streamed", "finish_reason", "error_type"),
    *("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens"),
    *("cost_picodollars", "first_token_ms", "latency_ms"),
)
_TEXT = (
    "%(generation)s %(status)s %(model)s for %(key)s: %(prompt_tokens)s + %(completion_tokens)s "
    "tokens, first after %(first_token_ms)s ms, all after %(latency_ms)s ms"
)


def tell(generation: Generation, status: int, key: Key | None) -> None:
    """That a reply has ended, and how; of its key the label."""
    facts = {name: getattr(generation, name) for name in _FIELDS}
    whose = {"generation": generation.id, "status": status, "key": key.label if key else None}
    log.info(_TEXT, whose | facts)
