"""Fixtures more than one test file needs."""

import os

# Read once, when the libraries are imported. One thread: two would only wait for each other over
# models as small as these.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from hypothesis import settings
from scripted import ScriptedEngine

from pipeline.base.dialogue import write_byte_tokenizer
from pipeline.chat import Chat
from pipeline.export import export_gguf
from pipeline.serve.app import App
from pipeline.serve.catalog import Catalog, Served


settings.register_profile("no deadline", deadline=None)  # machines are shared: no timing decides
settings.load_profile("no deadline")


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
def tiny_gguf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a GGUF file, with its tokenizer and template beside it."""
    folder = tmp_path_factory.mktemp("gguf") / "exports"
    export_gguf(tiny_base, folder, "tiny", ["bf16"])
    return folder / "tiny-bf16.gguf"


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on every linear layer of `tiny`, made by PEFT."""
    from adapters import make_adapter

    return make_adapter(tiny_base, tmp_path_factory.mktemp("adapters") / "random")


Serving = Callable[..., contextlib.AbstractContextManager[str]]


@pytest.fixture
def serving(chat: Chat) -> Serving:
    """A scripted engine behind the real application and a real uvicorn; gives its address."""

    @contextlib.contextmanager
    def serve(engine: ScriptedEngine, keep_alive_s: float = 10.0) -> Iterator[str]:
        app = App(Catalog([Served("tiny", chat, engine, 1767225600)]), keep_alive_s)
        config = uvicorn.Config(
            app, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            runner = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
            runner.start()
            try:
                yield f"http://127.0.0.1:{port}"
            finally:
                server.should_exit = True
                runner.join()

    return serve
