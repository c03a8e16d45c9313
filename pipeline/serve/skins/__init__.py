"""The dialects besides chat/completions: each reads to, and writes from, the one request."""
