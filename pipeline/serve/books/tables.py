"""The tables of the books: who may ask, and what was answered."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    false,
)

# Constraints get names by rule, so that a later revision can drop them on every database.
metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

keys = Table(
    "keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("hash", String(64), nullable=False, unique=True),
    Column("label", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("disabled", Boolean, nullable=False),
    Column("limit_picodollars", BigInteger),
    Column("limit_reset", Text),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
    Column("streams", Integer),
    Column("priority", Text),
    Column("models", JSON(none_as_null=True)),
    Column("expires_ms", BigInteger),
    Column("is_management", Boolean, nullable=False, server_default=false()),
    Column("updated_ms", BigInteger),
    Column("deleted_ms", BigInteger),
    Column("log_content", Boolean, nullable=False, server_default=false()),
)

generations = Table(
    "generations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("key_id", ForeignKey("keys.id")),
    Column("model", Text, nullable=False),
    Column("artefact_hash", Text),
    Column("engine", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("streamed", Boolean, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("reasoning_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),
    Column("finish_reason", Text),
    Column("native_finish_reason", Text),
    Column("latency_ms", Integer, nullable=False),
    Column("first_token_ms", Integer),
    Column("generation_ms", Integer),
    Column("cancelled", Boolean, nullable=False),
    Column("error_type", Text),
    Column("ignored", JSON, nullable=False),
    Column("http_referer", Text),
    Column("app_title", Text),
    Column("external_user", Text),
    Column("session_id", Text),
    Column("cost_picodollars", BigInteger, nullable=False),
    Column("provider", Text, nullable=False, server_default="Pipeline"),
    Column("user_agent", Text),
    Column("preset", Text),
    Column("cache_source", Text),
    Column("price_version", Text),
    Index(None, "key_id", "created_ms", "cost_picodollars"),
    Index(None, "created_ms"),
    Index(None, "model", "provider", "created_ms", "error_type"),
)

# What generations that were forgotten come to; several rows may have one day, key and place.
daily_sums = Table(
    "daily_sums",
    metadata,
    Column("day", Integer, nullable=False),
    Column("key_id", ForeignKey("keys.id")),
    Column("model", Text, nullable=False),
    Column("provider", Text, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("errors", BigInteger, nullable=False),
    Column("cancelled", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("cost_picodollars", BigInteger, nullable=False),
    Column("last_ms", BigInteger, nullable=False),
    Index(None, "key_id", "day"),
)

uses = Table(
    "uses",
    metadata,
    Column("id", Text, primary_key=True),
    Column("key_id", ForeignKey("keys.id"), nullable=False),
    Column("process", Text, nullable=False),
    Column("begun_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger),
    Column("tokens", BigInteger, nullable=False, server_default="0"),
    Column("cost_picodollars", BigInteger, nullable=False, server_default="0"),
    Index(None, "key_id"),
)

processes = Table(
    "processes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seen_ms", BigInteger, nullable=False),
)
