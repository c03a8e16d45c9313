"""How far a training is: a bar on a terminal, otherwise a log line every few seconds."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

log = logging.getLogger(__name__)
LOG_EVERY_S = 5.0

Tell = Callable[[int, int, str, bool], None]
"""Step, of how many, the facts in words, and whether a log line is due whatever the time."""


@contextmanager
def show_progress(console: Console | None, log_every_s: float = LOG_EVERY_S) -> Iterator[Tell]:
    """Show the steps of a training while the block runs; call what is given after each."""
    last = -log_every_s

    def log_sometimes(step: int, num_steps: int, facts: str, is_due: bool) -> None:
        nonlocal last
        if is_due or time.monotonic() - last >= log_every_s or step == num_steps:
            last = time.monotonic()
            log.info("step %d of %d  %s", step, num_steps, facts)

    if console is None or not console.is_terminal:
        yield log_sometimes
        return
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar, _logging_above():
        task = bar.add_task("the first step takes longer", total=None)

        def move(step: int, num_steps: int, facts: str, is_due: bool) -> None:  # noqa: ARG001
            bar.update(task, completed=step, total=num_steps, description=facts)

        yield move


@contextmanager
def _logging_above() -> Iterator[None]:
    """Log lines go above a live bar: rich has put its own stream in place of stderr's."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(sys.__stderr__)
