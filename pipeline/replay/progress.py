"""How far a replay is: a bar on a terminal, otherwise a log line now and then."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.replay.journal import Reply
from pipeline.replay.judge import Reason

log = logging.getLogger(__name__)

LOG_EVERY_S = 10.0
# A long reply takes minutes, and a rate needs several of them.
_RATE_PERIOD_S = 1800.0


@dataclass
class Tally:
    """What became of the prompts so far."""

    num_prompts: int
    num_kept: int = 0
    rejected: Counter[Reason] = field(default_factory=Counter)
    num_tokens: int = 0
    """Of finished replies, those of earlier runs included."""
    num_new_tokens: int = 0
    """Drawn by this run, unfinished replies included."""

    @property
    def num_done(self) -> int:
        """Kept and rejected."""
        return self.num_kept + self.rejected.total()

    @property
    def rejections(self) -> str:
        """In words, the commonest reason first: `3 unfinished, 1 malformed`."""
        return ", ".join(f"{count} {reason}" for reason, count in self.rejected.most_common())

    def __str__(self) -> str:
        """All counts in one line."""
        rejected = f", rejected {self.rejections}" if self.rejected else ""
        return f"kept {self.num_kept} of {self.num_prompts}{rejected}; {self.num_tokens} tokens"

    def facts(self) -> dict[str, Any]:
        """All counts, for the manifest."""
        return {
            "prompts": self.num_prompts,
            "kept": self.num_kept,
            "rejected": dict(self.rejected),
            "tokens": self.num_tokens,
        }

    def count(self, reply: Reply) -> None:
        """Add a finished reply."""
        self.num_tokens += reply.num_tokens
        if reply.reason is None:
            self.num_kept += 1
        else:
            self.rejected[reply.reason] += 1


@contextmanager
def show_progress(
    tally: Tally, console: Console, log_every_s: float = LOG_EVERY_S
) -> Iterator[Callable[[], None]]:
    """Show a tally while the block runs; call what is given whenever it has changed."""
    started = last = time.monotonic()

    def facts() -> str:
        rate = tally.num_new_tokens / max(time.monotonic() - started, 1e-9)
        return f"kept {tally.num_kept}, rejected {tally.rejected.total()}, {rate:.1f} tokens/s"

    def log_sometimes() -> None:
        nonlocal last
        if time.monotonic() - last >= log_every_s:
            last = time.monotonic()
            log.info("replay: %d of %d, %s", tally.num_done, tally.num_prompts, facts())

    if not console.is_terminal:
        yield log_sometimes
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    remaining = TimeRemainingColumn()
    with Progress(
        *columns, remaining, console=console, speed_estimate_period=_RATE_PERIOD_S
    ) as bar:
        task = bar.add_task(facts(), total=tally.num_prompts, completed=tally.num_done)
        yield lambda: bar.update(task, completed=tally.num_done, description=facts())
