"""Fixtures more than one test file needs."""

import os

# Read once, when the libraries are imported. One thread: two would only wait for each other over
# models as small as these.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import contextlib
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings
from postgres import Postgres, running_postgres
from running import running
from scripted import ScriptedEngine
from sqlalchemy import Engine

from pipeline import cli
from pipeline.base.dialogue import write_byte_tokenizer
from pipeline.chat import Chat
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.offer.catalog import Catalog, Served

settings.register_profile("no deadline", deadline=None)  # machines are shared: no timing decides
settings.load_profile("no deadline")
# A shell ignores Ctrl-C for what it starts in the background, and so would every test of it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def books_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """So that no server of a test writes into its user's books."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json and chat_template.jinja."""
    folder = tmp_path_factory.mktemp("chat")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def chat(chat_folder: Path) -> Chat:
    return Chat(chat_folder)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base `tiny`: a random Qwen3 with a byte vocabulary."""
    from pipeline.base.make import make_base  # torch takes seconds: only for tests that need it

    folder = tmp_path_factory.mktemp("bases") / "tiny"
    make_base("tiny", "", folder)
    return folder


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base `golden`, which knows its dialogues; a minute's work where the cache has it not."""
    from pipeline.base.make import make_base

    folder = tmp_path_factory.mktemp("bases") / "golden"
    make_base("golden", "", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a GGUF file, with its tokenizer and template beside it."""
    from pipeline.export import export_gguf

    folder = tmp_path_factory.mktemp("gguf") / "exports"
    export_gguf(tiny_base, folder, "tiny", ["bf16"])
    return folder / "tiny-bf16.gguf"


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on every linear layer of `tiny`, made by PEFT."""
    from adapters import make_adapter

    return make_adapter(tiny_base, tmp_path_factory.mktemp("adapters") / "random")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server for all tests; each takes a database of its own."""
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def books_at(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What --books may name: a folder, and a database on a server."""
    if request.param == "sqlite":
        return str(tmp_path)
    server: Postgres = request.getfixturevalue("postgres")
    return server.create_database()


@pytest.fixture
def books(books_at: str) -> Iterator[Engine]:
    """Empty ones."""
    with open_books(books_at) as opened:
        yield opened


Serving = Callable[..., contextlib.AbstractContextManager[str]]


@pytest.fixture
def serving(chat: Chat) -> Serving:
    """A scripted engine behind the real application and a real uvicorn; gives its address."""

    @contextlib.contextmanager
    def serve(
        engine: ScriptedEngine,
        keep_alive_s: float = 10.0,
        keys: Keys | None = None,
        ledger: Ledger | None = None,
    ) -> Iterator[str]:
        catalog = Catalog([Served("tiny", chat, engine, 1767225600)])
        app = App(catalog, keys, ledger, keep_alive_s)
        with running(app) as address:
            yield address

    return serve


# The shape of `tiny`; nothing in a workplace needs its weights.
CONFIG = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
}
RECIPE = (
    "base: base\n"
    "data: {sources: [{path: chats.jsonl}], eval: {path: held.jsonl}}\n"
    "train: {batch_rows: 2, steps: 3}\n"
)


class Said(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Pipeline = Callable[..., Said]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pipeline:
    """Runs a command in this process."""

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Said(int(caught.value.code or 0), captured.out, captured.err)

    return run


def conversation(question: str) -> str:
    """A line of a file of conversations."""
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "2", "reasoning": "One and one."},
    ]
    return json.dumps({"messages": messages}) + "\n"


@pytest.fixture
def workplace(tmp_path: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a base, a recipe `mine.yaml` and its data."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(chat_folder, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    for name in ("chats.jsonl", "held.jsonl"):
        text = "".join(conversation(f"{name} {i}?") for i in range(3))
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path
