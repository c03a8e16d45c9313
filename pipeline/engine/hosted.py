"""What engines behind a connection have in common: how they are entered, watched and left."""

from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.engine.connection import Connection


class Hosted:
    """A server process of ours, or somebody else's at a URL."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def is_gone(self) -> bool:
        """Whether the engine was our child, and has ended."""
        return self.connection.is_gone

    @property
    def has_failed(self) -> bool:
        """Whether our child has ended by itself, or a failure sent somebody to its log."""
        return self.is_gone or self.connection.has_failed

    @property
    def socket(self) -> Path:
        """Where our child listens."""
        assert self.connection.child is not None
        return self.connection.child.socket

    async def metrics(self) -> str:
        """What the engine counts, in Prometheus's text format."""
        return await self.connection.text("/metrics")

    async def close(self) -> None:
        """Close every connection and end the child, if there is one; twice does no harm."""
        await self.connection.close()
