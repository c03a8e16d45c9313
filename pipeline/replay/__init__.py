"""Self-distilled replay: the base answers general prompts, and what is sound becomes a source."""
