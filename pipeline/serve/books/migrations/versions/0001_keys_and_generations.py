"""The first books: keys, and one row for each generation."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        "keys",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("disabled", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("hash", name="uq_keys_hash"),
    )
    op.create_table(
        "generations",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("key_id", sa.Integer),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("artefact_hash", sa.Text),
        sa.Column("engine", sa.Text, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("streamed", sa.Boolean, nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("reasoning_tokens", sa.Integer, nullable=False),
        sa.Column("cached_tokens", sa.Integer, nullable=False),
        sa.Column("finish_reason", sa.Text),
        sa.Column("native_finish_reason", sa.Text),
        sa.Column("latency_ms", sa.Integer, nullable=False),
        sa.Column("first_token_ms", sa.Integer),
        sa.Column("generation_ms", sa.Integer),
        sa.Column("cancelled", sa.Boolean, nullable=False),
        sa.Column("error_type", sa.Text),
        sa.Column("ignored", sa.JSON, nullable=False),
        sa.Column("http_referer", sa.Text),
        sa.Column("app_title", sa.Text),
        sa.Column("external_user", sa.Text),
        sa.Column("session_id", sa.Text),
        sa.Column("cost_picodollars", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_generations"),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name="fk_generations_key_id"),
    )
