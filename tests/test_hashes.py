"""Which weights answered: told by what others have written down, and never read for it."""

import asyncio
import hashlib
import json
import os
from contextlib import closing
from pathlib import Path

import pytest
from inside import ask
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.run import Run, hash_value
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.books.ledger import Generation, Ledger
from pipeline.serve.offer.catalog import Catalog, Served, Upstream
from pipeline.serve.offer.door import Door
from pipeline.serve.offer.entries import read_entries
from pipeline.serve.offer.hashes import hash_once, known_hash
from pipeline.serve.offer.menu import Menu


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path: Path, chat_folder: Path) -> Run:
    """With an exported GGUF file, a merged checkpoint of two files, and an adapter."""
    made = Run(tmp_path / "runs" / "mine")
    for folder in (made.exports, made.merged, made.adapter):
        folder.mkdir(parents=True)
    for file in chat_folder.iterdir():
        (made.exports / file.name).write_bytes(file.read_bytes())
    (made.exports / "mine-q8_0.gguf").write_text("gguf")
    for name in ("a.safetensors", "b.safetensors", "config.json"):
        (made.merged / name).write_text(name)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (made.adapter / name).write_text(name)
    made.recipe.write_text("{}")
    made.record("train", {}, [made.adapter])
    made.record("merge", {}, [made.merged])
    made.record("export", {}, [made.exports])
    return made


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_run_knows_what_its_stages_have_made(run: Run) -> None:
    assert known_hash(run.exports / "mine-q8_0.gguf") == sha256("gguf")
    weights = {name: sha256(name) for name in ("a.safetensors", "b.safetensors")}
    assert known_hash(run.merged) == hash_value(weights)
    assert known_hash(run.adapter) == hash_value(
        {"adapter_model.safetensors": sha256("adapter_model.safetensors")}
    )


def test_a_file_that_was_written_since_is_not_known(run: Run) -> None:
    gguf, one = run.exports / "mine-q8_0.gguf", run.merged / "b.safetensors"
    gguf.write_text("other")
    os.utime(one, (1, 1))

    assert known_hash(gguf) is None
    assert known_hash(run.merged) is None


def test_a_checkpoint_that_nobody_has_read_is_not_read(tmp_path: Path) -> None:
    """A blob of a cache, which a link in the folder stands for, as the hub's library has it."""
    blob, folder = tmp_path / "blob", tmp_path / "base"
    blob.write_text("weights")
    folder.mkdir()
    file = folder / "model.safetensors"
    file.symlink_to(blob)

    assert known_hash(folder) is None
    assert known_hash(tmp_path / "cache") is None
    hash_once(folder, [file])
    assert known_hash(folder) == hash_value({file.name: sha256("weights")})


def served(chat: Chat, **model: object) -> list[Served]:
    [entry] = read_entries(Menu.model_validate({"models": [model]}))
    return entry.serve(entry.set_up(), chat, ScriptedEngine(["a"]), Door())


def test_models_have_the_hashes_of_their_weights_and_adapters(chat: Chat, run: Run) -> None:
    lora = run.exports / "mine-lora.gguf"
    lora.write_text("lora")
    ours = {"run": str(run.folder), "engine": "llamacpp", "adapters": {"me/tuned": str(lora)}}
    weights, without = served(chat, **ours)
    run.record("export", {}, [run.exports])
    _, tuned = served(chat, **ours)
    [elsewhere] = served(chat, urls="http://127.0.0.1:1", tokenizer=str(run.exports))

    assert (weights.artefact_hash, without.artefact_hash) == (sha256("gguf"), None)
    assert tuned.artefact_hash == hash_value([sha256("gguf"), sha256("lora")])
    assert elsewhere.artefact_hash is None


def test_the_books_say_which_weights_answered(chat: Chat, run: Run, tmp_path: Path) -> None:
    [model] = served(chat, run=str(run.folder), engine="llamacpp")
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
    with open_books(str(tmp_path)) as books, closing(Ledger(books)) as ledger:
        app = App(Catalog([model]), None, ledger)

        async def answered() -> Generation | None:
            answer = await ask(app, "POST", "/v1/chat/completions", {}, body)
            return await ledger.find(answer.json["id"])

        row = asyncio.run(answered())

    assert row is not None
    assert row.artefact_hash == sha256("gguf")


def test_of_a_server_elsewhere_nobody_knows_the_weights(chat: Chat) -> None:
    there = (Upstream("http://127.0.0.1:1", "", "x", "Far Away"),)
    engine, ours = ScriptedEngine(), sha256("ours")
    model = Served("tiny", chat, engine, 1, artefact_hash=ours, upstreams=there)

    async def look() -> list[str | None]:
        app = App(Catalog([model]))
        found = [endpoint.artefact_hash for endpoint in app.endpoints_of(model)]
        await app.close()
        return found

    assert asyncio.run(look()) == [ours, None]
