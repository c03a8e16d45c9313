"""Sources to conversations, checked, to rows on disk."""
