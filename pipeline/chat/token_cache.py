"""Token ids of the texts that were asked for last."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

Encode = Callable[[Sequence[str]], list[list[int]]]


class TokenCache:
    """Least recently used texts go first; threads may share it."""

    def __init__(self, max_texts: int, max_characters: int) -> None:
        """At most `max_texts` are kept, none of them longer than `max_characters`."""
        self._max_texts = max_texts
        self._max_characters = max_characters
        self._known: OrderedDict[str, list[int]] = OrderedDict()
        self._lock = threading.Lock()

    def ids(self, texts: Sequence[str], encode: Encode) -> list[list[int]]:
        """Of each text; those that are not known are encoded together, each once."""
        with self._lock:
            found = {text: self._known[text] for text in texts if text in self._known}
            for text in found:
                self._known.move_to_end(text)
        new = list(dict.fromkeys(text for text in texts if text not in found))
        made = dict(zip(new, encode(new), strict=True)) if new else {}
        with self._lock:
            self._known.update(
                (text, ids) for text, ids in made.items() if len(text) <= self._max_characters
            )
            while len(self._known) > self._max_texts:
                self._known.popitem(last=False)
        found |= made
        return [found[text] for text in texts]
