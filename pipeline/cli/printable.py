"""What somebody else has written, as a terminal may show it."""


def printable(text: str) -> str:
    """Without what would move the cursor or change the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
