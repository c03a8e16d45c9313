"""The pages of metrics of a server's other processes, so that each of them can tell them all."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

EVERY_S = 2.0
"""How old a page may be."""
_ENDING = ".metrics"


@dataclass(frozen=True)
class Pages:
    """Files in a folder of the server's own, one for each process."""

    folder: Path
    process: str
    """What this one is called."""

    async def keep(self, page: Callable[[], Awaitable[bytes]]) -> None:
        """Write ours, for ever."""
        file = self.folder / f"{self.process}{_ENDING}"
        new = file.with_suffix(".new")
        while True:
            text = await page()
            with contextlib.suppress(OSError):  # a full disk is told of elsewhere
                new.write_bytes(text)
                new.replace(file)
            await asyncio.sleep(EVERY_S)

    @property
    def others(self) -> Mapping[str, str]:
        """By the names of their processes, as they were last written."""
        return dict(self._read())

    def _read(self) -> Iterator[tuple[str, str]]:
        for file in sorted(self.folder.glob(f"*{_ENDING}")):
            if file.stem != self.process:
                with contextlib.suppress(OSError):
                    yield file.stem, file.read_text(encoding="utf-8")
