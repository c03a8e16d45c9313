"""A reply as it comes: an engine's deltas in, what a client is told out."""
