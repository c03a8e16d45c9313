"""The server: a catalog, a dialogue and a wire format over an engine."""
