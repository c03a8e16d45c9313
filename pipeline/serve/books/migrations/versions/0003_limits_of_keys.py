"""What a key may do, and keys that are deleted: their generations stay theirs."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns; the index sums what a key has spent without reading its rows."""
    for name in ("limit_picodollars", "expires_ms", "updated_ms", "deleted_ms"):
        op.add_column("keys", sa.Column(name, sa.BigInteger))
    for name in ("requests_per_minute", "tokens_per_minute", "streams"):
        op.add_column("keys", sa.Column(name, sa.Integer))
    op.add_column("keys", sa.Column("limit_reset", sa.Text))
    op.add_column("keys", sa.Column("models", sa.JSON(none_as_null=True)))
    no = sa.false()
    op.add_column("keys", sa.Column("is_management", sa.Boolean, nullable=False, server_default=no))
    op.drop_index("ix_generations_key_id", "generations")
    columns = ["key_id", "created_ms", "cost_picodollars"]
    op.create_index("ix_generations_key_id", "generations", columns)
