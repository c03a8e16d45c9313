"""`pipeline data from-log`: a content log to a file of conversations."""

import datetime
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DataError, RunError
from pipeline.serve.content.entry import Line
from pipeline.serve.content.files import read_lines
from pipeline.serve.content.lessons import find_lessons


@dataclass(frozen=True)
class Wanted:
    """Which entries of a log; what is empty or None is no condition."""

    model: str = ""
    key: str = ""
    """How its hash begins."""
    since: datetime.date | None = None

    def takes(self, line: Line) -> bool:
        """Whether it is one of them."""
        slug = str(line.get("model")).lower()
        is_of_model = self.model.lower() in ("", slug, slug.partition(":")[0])
        return is_of_model and str(line.get("key")).startswith(self.key.lower())


def learn_from_log(folder: Path, out: Path, wanted: Wanted) -> list[str]:
    """Write a new file, and say what is in it and what was left out."""
    if out.exists():
        raise RunError(f"{out} is there already: remove it, or name another file")
    lines = (line for line in read_lines(folder, wanted.since) if wanted.takes(line))
    found = find_lessons(lines)
    counts = [f"{number} {why}" for why, number in found.left_out.most_common()]
    left_out = f"left out: {', '.join(counts)}" if counts else "nothing was left out"
    if not found.conversations:
        what = left_out if counts else "keys made with --log-content have their replies there"
        raise DataError(f"{folder} has nothing to learn from: {what}")
    _write(out, found.conversations)
    return [
        f"{out}: {len(found.conversations)} conversations, {found.num_answers} answers",
        left_out,
    ]


def _write(out: Path, conversations: list[Line]) -> None:
    """Under a temporary name until it is whole; for nobody else to read."""
    temporary = out.with_name(f"{out.name}.partial")
    try:
        with open(temporary, "w", encoding="utf-8", opener=_private) as file:
            for conversation in conversations:
                file.write(json.dumps(conversation, ensure_ascii=False) + "\n")
        temporary.replace(out)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
