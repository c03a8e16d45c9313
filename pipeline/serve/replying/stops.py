"""Stop strings in a text that comes in chunks."""


class StopStrings:
    """Let text through until the first stop string; what may begin one is held back."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.met: str | None = None
        """The one that has ended the text."""
        self._stops = stops
        self._held = ""

    @property
    def is_met(self) -> bool:
        """Whether the text is over."""
        return self.met is not None

    def feed(self, text: str) -> str:
        """Take the next text, give what is certainly before any stop."""
        if not self._stops:
            return text
        text = self._held + text
        # The stop that is complete first wins, so chunk boundaries cannot decide between two.
        found = [(text.find(stop) + len(stop), len(stop)) for stop in self._stops if stop in text]
        if found:
            end, size = min(found, key=lambda place: (place[0], -place[1]))
            self.met, self._held = text[end - size : end], ""
            return text[: end - size]
        certain = len(text) - self._undecided(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """No more text comes for now: give what was held back."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """How many last characters are the beginning of a stop."""
        return max(
            (
                size
                for stop in self._stops
                for size in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
