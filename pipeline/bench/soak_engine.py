"""The soak's engine as a process: each reply counts, under the number of who has asked for it."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Receive, Scope, Send

from pipeline.bench.gateway_engine import Engine, answer
from pipeline.bench.gateway_script import Part, Script, serve_on

HEAVY = 1_000_000
"""From this number on words are long."""
_HEAVY_CHARACTERS = 2048


def word(number: int, place: int) -> str:
    """The one at a place of a reply, which nobody else is told."""
    said = f"{number}.{place};"
    return said.ljust(_HEAVY_CHARACTERS, "-") if number >= HEAVY else said


@dataclass
class Counting(Engine):
    """Who asks says the number as `seed`; a GET of /given tells how many words each has got."""

    given: Counter[str] = field(default_factory=Counter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["path"] == "/given":
            await answer(send, 200, self.given)
        else:
            await super().__call__(scope, receive, send)

    def _part(self, body: dict[str, Any]) -> Part:
        number = body["seed"] or 0
        return Part([word(number, place) for place in range(body["max_tokens"])], "length")

    def _completion(self, body: dict[str, Any]) -> Iterator[bytes]:
        for event in super()._completion(body):
            self.given[str(body["seed"] or 0)] += 1
            yield event


if __name__ == "__main__":
    serve_on(int(sys.argv[1]), Counting(Script(0, 0)))
