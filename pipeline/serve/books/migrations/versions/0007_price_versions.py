"""By which price the cost of a generation was counted."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """It is not known of those that are there."""
    op.add_column("generations", sa.Column("price_version", sa.Text))
