"""Rows as JSON lines, for anyone who wants to check them from outside."""

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from pipeline.data.store import read_rows
from pipeline.errors import RunError
from pipeline.tree import IGNORED


def dump_rows(parts: Mapping[str, Path], out: Path) -> None:
    """Write every row of some files under their part's name, into a new file.

    RunError if something has that name already, or it cannot be written; nothing is left then.

    A line has `input_ids`, `labels` of the same length, `source` as path:line, `turn`, `mode` and
    `part`. A label stands at its token's own place: nothing is shifted.
    """
    if out.exists():
        raise RunError(f"{out} is there already: remove it, or dump to another file")
    temporary = out.with_name(out.name + ".partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for part, path in parts.items():
                for row in read_rows(path):
                    line = {
                        "input_ids": row.prompt_ids + row.completion_ids,
                        "labels": [IGNORED] * len(row.prompt_ids) + row.completion_ids,
                        "source": row.source,
                        "turn": row.turn,
                        "mode": row.mode,
                        "part": part,
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        temporary.replace(out)
    except pa.ArrowException as error:
        raise RunError(f"{path} is no file of rows; run `pipeline data` again") from error
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
