"""What happened to conversations on their way to rows: counts, and the first few places of each."""

from collections import Counter, defaultdict
from typing import Literal

Note = Literal[
    "invalid",
    "overlong",
    "history_split",
    "without_reasoning",
    "context_only",
    "unanswered",
    "names",
    "stray_tags",
    "switched_think",
    "switched_no_think",
    "texts_cut",
]
MAX_EXAMPLES = 5


class Notes:
    """Counts by note, and for each the first few sentences that say where and what."""

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, note: Note, sentence: str, number: int = 1) -> None:
        """Count something that happened `number` times at a place the sentence begins with."""
        if number:
            self.counts[note] += number
            self._keep(note, [sentence])

    def include(self, other: "Notes") -> None:
        """Add another's counts, its places after those already here."""
        self.counts += other.counts
        for note, sentences in other.examples.items():
            self._keep(note, sentences)

    def _keep(self, note: str, sentences: list[str]) -> None:
        kept = self.examples[note]
        kept += sentences[: MAX_EXAMPLES - len(kept)]
