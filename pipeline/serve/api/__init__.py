"""HTTP: which handler answers, whose request it is, and the way of a reply to its client."""
