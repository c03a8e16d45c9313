"""How books get from one program's tables to the next one's.

A change of `tables` needs one more file in `versions`, numbered on, and its number here.
"""

HEAD = "0007"
"""The newest revision. Known without Alembic, which books that have it then need not import."""
