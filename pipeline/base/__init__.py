"""Bases: where a checkpoint to start from comes from."""
