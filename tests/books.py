"""Books and rows for tests."""

from typing import Any

from sqlalchemy import Connection

from pipeline.serve.books.ledger import Generation


def hold(connection: Connection) -> None:
    """Let nobody else write into the books until this commits."""
    is_sqlite = connection.dialect.name == "sqlite"
    connection.exec_driver_sql(
        "DELETE FROM generations WHERE false"
        if is_sqlite
        else "LOCK TABLE generations, keys IN SHARE MODE"
    )


def generation(number: int = 0, **changed: Any) -> Generation:
    """A finished generation with every field set."""
    fields: dict[str, Any] = {
        "id": f"gen-1767225600-{number:020}",
        "key_id": None,
        "model": "local/golden",
        "artefact_hash": "ab" * 32,
        "engine": "llamacpp",
        "created_ms": 1767225600123,
        "streamed": True,
        "prompt_tokens": 24,
        "completion_tokens": 90,
        "reasoning_tokens": 60,
        "cached_tokens": 16,
        "finish_reason": "stop",
        "native_finish_reason": "eos",
        "latency_ms": 1000,
        "first_token_ms": 100,
        "generation_ms": 900,
        "cancelled": True,
        "error_type": "provider_unavailable",
        "ignored": ("verbosity", "top_a"),
        "http_referer": "https://example.org",
        "app_title": "An app",
        "external_user": "somebody",
        "session_id": "a session",
        "provider": "Elsewhere",
        "user_agent": "a client/1.0",
        "preset": "careful",
        "price_version": "1000/2000/-/0",
        "cache_source": "gen-1767225599-00000000000000000000",
        "cost_picodollars": 5_000_000_000_000,
    }
    return Generation(**(fields | changed))
