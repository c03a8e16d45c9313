"""What was measured of endpoints: read from the ledger now and then, for all requests together."""

import asyncio
import logging
import time
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from pipeline.serve.books.ledger import Ledger
from pipeline.serve.books.measured import UNMEASURED, Measured

log = logging.getLogger(__name__)

FRESH_S = 10.0
"""So long nothing is read again."""
Place = tuple[str, str]
"""A model's slug, and who answers."""


class Measuring:
    """In one event loop. Without a ledger nothing is measured."""

    def __init__(self, ledger: Ledger | None, now_s: Callable[[], float] = time.time) -> None:
        self._ledger = ledger
        self._now_s = now_s
        self._known: dict[Place, Measured] = {}
        self._read_s: dict[Place, float] = {}
        self._reading: dict[Place, asyncio.Task[None]] = {}

    def latest(self, place: Place) -> Measured:
        """What is known, at once; what is old is read again meanwhile."""
        self._renew(place)
        return self._known.get(place, UNMEASURED)

    async def renew(self, place: Place) -> None:
        """Wait until what is known is not old."""
        self._renew(place)
        reading = self._reading.get(place)
        if reading and not reading.done():
            await asyncio.wait([reading])  # others may wait for it, too, when this is cancelled

    def _renew(self, place: Place) -> None:
        reading, read_s = self._reading.get(place), self._read_s.get(place)
        is_old = read_s is None or time.monotonic() - read_s >= FRESH_S
        if self._ledger and is_old and (reading is None or reading.done()):
            self._reading[place] = asyncio.create_task(self._read(self._ledger, place))

    async def _read(self, ledger: Ledger, place: Place) -> None:
        try:
            self._known[place] = await ledger.measured(*place, int(self._now_s() * 1000))
        except SQLAlchemyError as error:  # what was known before is told until it can be read
            log.warning("how %s is answered by %s cannot be read: %s", *place, error)
        self._read_s[place] = time.monotonic()
