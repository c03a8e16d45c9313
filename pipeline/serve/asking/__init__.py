"""What a client asks: read, checked, and decided against a model into an order."""
