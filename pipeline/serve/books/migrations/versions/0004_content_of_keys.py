"""Whose requests and replies are kept, word by word."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column; nobody's are unless somebody says so."""
    no = sa.false()
    op.add_column("keys", sa.Column("log_content", sa.Boolean, nullable=False, server_default=no))
