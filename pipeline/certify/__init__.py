"""Proof that what is served is what was trained."""
