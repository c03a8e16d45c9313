"""The content log: no reply waits for it, and what it cannot keep is lost without harm."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import orjson
from sqlalchemy.engine import URL

from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.books.keys import Key
from pipeline.serve.books.ledger import Generation
from pipeline.serve.content.entry import Entry, Line
from pipeline.serve.content.files import ContentFiles, content_folder
from pipeline.serve.content.redaction import Redact, RedactionError, find_redaction, redacted
from pipeline.serve.offer.menu import ContentLogging

log = logging.getLogger(__name__)

SWEEP_S = 3600.0
"""How often what is too old is looked for while nothing comes."""
MAX_WAITING = 1000
"""Entries on their way to a disk that is slow; what comes after them is lost."""


class ContentLog:
    """A thread that redacts and writes."""

    def __init__(self, files: ContentFiles, redact: Redact | None = None) -> None:
        self._files = files
        self._redact = redact
        self._entries: queue.SimpleQueue[Entry | Future[None] | None] = queue.SimpleQueue()
        self._is_losing = False
        self._searching = asyncio.Lock()  # through a day's files: one at a time keeps cores free
        self._writer = threading.Thread(target=self._write_all, name="content", daemon=True)
        self._writer.start()

    def put(self, entry: Entry) -> None:
        """It will be written, or lost: nobody waits for it."""
        if self._entries.qsize() < MAX_WAITING:
            self._entries.put(entry)
        else:
            self._lose("more comes than can be written")

    async def find(self, generation: Generation) -> Line | None:
        """The entry of a generation, if it was kept and still is."""
        written: Future[None] = Future()
        self._entries.put(written)
        await asyncio.wrap_future(written)
        async with self._searching:
            return await asyncio.to_thread(self._files.find, generation.id, generation.created_ms)

    def close(self) -> None:
        """Write what is on its way and stop."""
        self._entries.put(None)
        self._writer.join()

    def _write_all(self) -> None:
        self._sweep()
        while True:
            try:
                entry = self._entries.get(timeout=SWEEP_S)
            except queue.Empty:
                self._sweep()
                continue
            if entry is None:
                return
            if isinstance(entry, Entry):
                self._write(entry)
            elif entry.set_running_or_notify_cancel():
                entry.set_result(None)

    def _write(self, entry: Entry) -> None:
        try:
            line: Line | None = entry.line()
            if self._redact and line is not None:
                line = redacted(line, self._redact)
            if line is None:
                return
            text = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        except RedactionError as error:
            log.error("the content of %s is not kept: %s", entry.generation.id, error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next entries are kept
            what = type(error).__name__  # its words may quote the content
            log.error(
                "the content of %s is not kept: it is no JSON (%s)", entry.generation.id, what
            )
        else:
            self._append(entry.generation.created_ms, text)

    def _append(self, created_ms: int, text: bytes) -> None:
        try:
            self._files.append(created_ms, text)
        except OSError as error:
            self._lose(f"{error.filename or self._files.folder}: {error.strerror}")
            return
        if self._is_losing:
            log.warning("content is kept again")
        self._is_losing = False

    def _lose(self, why: str) -> None:
        """Told once, until it has gone well again."""
        if not self._is_losing:
            log.error("content is lost, and nothing else: %s", why)
        self._is_losing = True

    def _sweep(self) -> None:
        try:
            num_deleted = self._files.sweep()
        except OSError as error:
            log.error("old content is not deleted: %s: %s", error.filename, error.strerror)
            return
        if num_deleted:
            log.info("%d files of content are deleted: too old, or too much", num_deleted)


def wants_content(key: Key | None, request: ChatRequest) -> bool:
    """Whether a key's replies are kept, and this request does not forbid it."""
    is_private = request.provider is not None and request.provider.is_private
    return key is not None and key.log_content and not is_private


@contextlib.contextmanager
def open_content_log(rules: ContentLogging, books: URL) -> Iterator[ContentLog]:
    """The one beside some books; PipelineError for a redaction that is not there."""
    redact = find_redaction(rules.redact) if rules.redact else None
    files = ContentFiles(content_folder(books), rules.keep_days, rules.max_bytes)
    with contextlib.closing(ContentLog(files, redact)) as content:
        yield content
