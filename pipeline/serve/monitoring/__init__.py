"""What is told of a running server: metrics and its log; never a word of a reply, and no key."""
