"""The data stage: sources to rows on disk, counted, with the held-out part apart."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.chat import Chat
from pipeline.data.messages import Conversation, read_conversations
from pipeline.data.rows import Row, make_rows
from pipeline.data.store import write_rows
from pipeline.errors import DataError
from pipeline.recipe import Data, Source
from pipeline.run import whole_folder, write_json

log = logging.getLogger(__name__)


TRAIN, EVAL, REPORT = "train.arrow", "eval.arrow", "report.json"


def prepare(data: Data, chat: Chat, seed: int, out: Path) -> dict[str, Any]:
    """Write training and held-out rows and a report into a folder; returns the report.

    Rows go from the source to the disk one conversation at a time. Raises DataError at the first
    conversation that cannot become rows, or drops it with a count under `invalid: drop`. Nothing
    is left under `out` then, or what was there before.
    """
    with whole_folder(out) as temporary:
        report = _prepare(data, chat, seed, temporary)
        write_json(temporary / REPORT, report)
    return report


def _prepare(data: Data, chat: Chat, seed: int, out: Path) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    train_counts: Counter[str] = Counter()
    held_counts: Counter[str] = Counter()
    chosen = (c for s in data.sources for c in _read(s, data, counts) if not _held(c, data, seed))
    report: dict[str, Any] = {
        "train_sha256": write_rows(
            out / TRAIN, _count(_rows(chosen, chat, data, counts), train_counts)
        )
    }
    kept = (
        _read(Source(path=data.eval.path), data, counts)
        if data.eval.path
        else (c for s in data.sources for c in _read(s, data, Counter()) if _held(c, data, seed))
    )
    held = _count(_rows(kept, chat, data, counts), held_counts)
    report["eval_sha256"] = write_rows(out / EVAL, held)
    if not train_counts["rows"]:
        raise DataError("no row is left to train on; see data.max_tokens and data.thinking")
    if not held_counts["rows"]:
        raise DataError("no row is held out; name data.eval.path or raise data.eval.share")
    return report | {"train": dict(train_counts), "eval": dict(held_counts), "noted": dict(counts)}


def _read(source: Source, data: Data, counts: Counter[str]) -> Iterator[Conversation]:
    num_read = 0
    for found in read_conversations(Path(source.path)):
        if isinstance(found, DataError):
            _refuse_or_count(found, data, counts)
            continue
        num_read += 1
        yield found
        if num_read == source.cap:
            return


def _held(conversation: Conversation, data: Data, seed: int) -> bool:
    """Whether a conversation belongs to the held-out share: by its content, wherever it stands."""
    if data.eval.share is None:
        return False
    text = json.dumps([seed, conversation.messages, conversation.tools], sort_keys=True)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < data.eval.share * 2**64


def _rows(
    conversations: Iterator[Conversation], chat: Chat, data: Data, counts: Counter[str]
) -> Iterator[Row]:
    for conversation in conversations:
        counts["conversations"] += 1
        try:
            yield from make_rows(conversation, chat, data, counts)
        except DataError as error:
            _refuse_or_count(error, data, counts)


def _refuse_or_count(error: DataError, data: Data, counts: Counter[str]) -> None:
    if data.invalid == "refuse":
        raise error
    counts["invalid"] += 1
    log.warning("dropped: %s", error)


def _count(rows: Iterator[Row], counts: Counter[str]) -> Iterator[Row]:
    for row in rows:
        num_tokens = len(row.prompt_ids) + len(row.completion_ids)
        counts["rows"] += 1
        counts[f"{row.mode}_rows"] += 1
        counts["prompt_tokens"] += len(row.prompt_ids)
        counts["supervised_tokens"] += len(row.completion_ids)
        counts["longest_row"] = max(counts["longest_row"], num_tokens)
        yield row
