"""Where Alembic begins: revisions run on the connection that `open_books` hands over."""

from alembic import context

from pipeline.serve.books.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
