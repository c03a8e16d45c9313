"""Who answered, on whose behalf and from what: routing, presets, the cache of replies."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns, and what finds the rows of a key by their time."""
    provider = sa.Column("provider", sa.Text, nullable=False, server_default="Pipeline")
    op.add_column("generations", provider)
    for name in ("user_agent", "preset", "cache_source"):
        op.add_column("generations", sa.Column(name, sa.Text))
    op.create_index("ix_generations_key_id", "generations", ["key_id", "created_ms"])
