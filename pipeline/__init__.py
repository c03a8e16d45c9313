"""Make Qwen3 your own and serve it: from conversations to a certified, served checkpoint."""
