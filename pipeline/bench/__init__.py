"""Benchmarks: what the README's tables are measured with."""
