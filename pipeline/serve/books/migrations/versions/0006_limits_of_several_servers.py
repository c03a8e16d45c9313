"""Whose requests go first, and what requests hold of limits that several processes share."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0004"


def upgrade() -> None:
    """A row for each request of a key with limits, and for each process that answers."""
    op.add_column("keys", sa.Column("priority", sa.Text))
    op.create_table(
        "processes",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("seen_ms", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_processes"),
    )
    op.create_table(
        "uses",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("key_id", sa.Integer, nullable=False),
        sa.Column("process", sa.Text, nullable=False),
        sa.Column("begun_ms", sa.BigInteger, nullable=False),
        sa.Column("ended_ms", sa.BigInteger),
        sa.Column("tokens", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("cost_picodollars", sa.BigInteger, nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("id", name="pk_uses"),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name="fk_uses_key_id"),
    )
    op.create_index("ix_uses_key_id", "uses", ["key_id"])
