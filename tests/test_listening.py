"""Where a server listens, and whom it lets in."""

import json
import logging
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from elsewhere import free_port, llamacpp_at

from pipeline.errors import PipelineError
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.server import serve
from pipeline.serve.settings import Settings


def status_of(url: str, key: str) -> int:
    """Of a request for a reply."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url}/chat/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as refused:
        return refused.code


def serve_and_look(
    chat_folder: Path, gguf: Path, settings: dict[str, Any], look: Callable[[str, str | None], None]
) -> None:
    """Serve an engine elsewhere until `look`, told the address and the first key, is done."""
    port = free_port()

    def look_and_stop(url: str, key: str | None) -> None:
        try:
            look(url, key)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def ready(url: str, key: str | None, _models: Any) -> None:
        Thread(target=look_and_stop, args=(url, key)).start()

    with llamacpp_at(port, gguf):
        engine = f"http://127.0.0.1:{port}/v1"
        serve(chat_folder, Settings(port=0, engine=engine, model="me/mine", **settings), ready)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_nobody_else_may_come_before_there_is_a_key(
    host: str, chat_folder: Path, tmp_path: Path
) -> None:
    books = str(tmp_path)
    settings = Settings(
        port=0, host=host, books=books, engine=f"http://127.0.0.1:{free_port()}", model="me/x"
    )
    with open_books(books) as opened:
        keys = Keys(opened)
        for state in ({"disabled": True}, {"expires_ms": 1}):
            keys.create("useless", state)
        keys.create("gone")
        keys.delete(keys.all()[-1])

    with pytest.raises(PipelineError, match=r"there is no key yet: make one .* or .* --open"):
        serve(chat_folder, settings, lambda *_: None)


def test_with_a_key_it_listens_everywhere_and_without_one_nobody_gets_in(
    chat_folder: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    with open_books(str(tmp_path)) as books:
        key = Keys(books).create("mine")
    seen: list[Any] = []

    def look(url: str, first: str | None) -> None:
        seen.extend([url.partition("//")[2].rpartition(":")[0], first])
        seen.extend([status_of(url, ""), status_of(url, key)])

    serve_and_look(chat_folder, tiny_gguf, {"host": "0.0.0.0", "books": str(tmp_path)}, look)

    assert seen == ["0.0.0.0", None, 401, 200]


def test_an_open_server_answers_everybody_makes_no_key_and_says_so(
    chat_folder: Path, tiny_gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []

    def look(url: str, first: str | None) -> None:
        seen.extend([first, status_of(url, ""), status_of(url, "anything")])

    settings = {"host": "0.0.0.0", "is_open": True, "books": str(tmp_path)}
    with caplog.at_level(logging.WARNING):
        serve_and_look(chat_folder, tiny_gguf, settings, look)

    assert seen == [None, 200, 200]
    assert "is open: everybody who can reach it is answered" in caplog.text
    with open_books(str(tmp_path)) as books:
        assert Keys(books).all() == []
