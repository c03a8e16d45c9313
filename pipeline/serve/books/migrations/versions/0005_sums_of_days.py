"""What is left of generations that are forgotten, and what finds the others by time and place."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
_SUMMED = (
    "requests",
    "errors",
    "cancelled",
    "prompt_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "cached_tokens",
    "cost_picodollars",
)


def upgrade() -> None:
    """Make the table; the index of places tells failures without reading their rows."""
    op.create_table(
        "daily_sums",
        sa.Column("day", sa.Integer, nullable=False),
        sa.Column("key_id", sa.Integer),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in _SUMMED),
        sa.Column("last_ms", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name="fk_daily_sums_key_id"),
    )
    op.create_index("ix_daily_sums_key_id", "daily_sums", ["key_id", "day"])
    op.create_index("ix_generations_created_ms", "generations", ["created_ms"])
    place = ["model", "provider", "created_ms", "error_type"]
    op.create_index("ix_generations_model", "generations", place)
