"""Official clients work unchanged but for address and key: each runs a program of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import Server, run_server

pytestmark = [pytest.mark.clients, pytest.mark.node, pytest.mark.slow]
TESTS = Path(__file__).parent
INTERPRETERS = {
    "clients": str(TESTS.parent / ".venv-clients/bin/python"),
    "clients-old": str(TESTS.parent / ".venv-clients-old/bin/python"),
    "own": sys.executable,  # where the client of OpenAI is a newer one
    "node": "node",
}
PROGRAMS = [
    ("clients", "openrouter_chat.py"),
    ("clients-old", "openrouter_chat.py"),
    ("clients-old", "langchain_chat.py"),
    ("clients", "litellm_chat.py"),
    ("clients", "openai_chat.py"),
    ("own", "openai_chat.py"),
    ("node", "sdk_chat.mjs"),
    ("node", "ai_sdk_chat.mjs"),
    ("clients", "openrouter_responses.py"),
    ("clients-old", "openrouter_responses.py"),
    ("clients", "openai_responses.py"),
    ("own", "openai_responses.py"),
    ("node", "sdk_responses.mjs"),
    ("clients", "anthropic_messages.py"),
    ("clients", "openai_completion.py"),
    ("node", "ai_sdk_completion.mjs"),
]


@pytest.fixture(scope="module")
def server(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    books = tmp_path_factory.mktemp("serve") / "books.sqlite"
    with run_server(golden, books, "--engine", "llamacpp") as server:
        yield server


@pytest.mark.parametrize(("interpreter", "program"), PROGRAMS)
def test_a_client_does_all_it_can(server: Server, interpreter: str, program: str) -> None:
    environment = {
        "OPENROUTER_API_BASE": server.url,
        "OPENROUTER_API_KEY": server.key,
        "OPENROUTER_MODEL": server.model,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it would fetch prices from the internet
    }
    ended = subprocess.run(
        [INTERPRETERS[interpreter], str(TESTS / "clients" / program)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
