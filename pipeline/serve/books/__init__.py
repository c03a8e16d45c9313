"""What is kept of keys and generations: a database, and what waits beside it."""
