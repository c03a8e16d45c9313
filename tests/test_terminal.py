"""`pipeline chat` against the real application."""

import asyncio
import io
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from rich.console import Console
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.errors import PipelineError
from pipeline.serve.terminal import Speaker, talk

THOUGHT = ["<think>", "\nhm\n", "</think>", "\n\n", "[bold]yes[/bold]"]


def test_replies_are_printed_and_history_is_kept(
    serving: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    shown = Console(file=io.StringIO(), width=80)
    engine = ScriptedEngine(THOUGHT)

    with serving(engine) as base:
        talk(f"{base}/api/v1", "key", "tiny", "thinking", shown)

    assert shown.file.getvalue().count("hm\n\n[bold]yes[/bold]") == 2  # type: ignore[attr-defined]
    # Each reply is asked for twice: up to the end of its thought, and on from there.
    prompts = [chat.decode(prompt_ids) for prompt_ids, _ in engine.asked[::2]]
    assert len(prompts) == 2
    assert "one<|im_end|>" in prompts[1]
    assert "[bold]yes[/bold]<|im_end|>" in prompts[1]


def test_direct_mode_is_asked_for(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    engine = ScriptedEngine(["yes"])
    with serving(engine) as base:
        talk(f"{base}/api/v1", "key", "tiny", "direct", Console(file=io.StringIO()))

    assert engine.asked[0][1].temperature == 0.7


def test_no_server_a_wrong_address_and_a_refusal_are_one_sentence(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(PipelineError, match="no server answers"):
        talk("http://127.0.0.1:9/api/v1", "key", "tiny", "direct", console)
    with serving(ScriptedEngine(fails_at=0)) as base:
        with pytest.raises(PipelineError, match="ends in /api/v1"):
            talk(base, "key", "tiny", "direct", console)
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
        with pytest.raises(PipelineError, match="Provider returned error"):
            talk(f"{base}/api/v1", "key", "tiny", "direct", console)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (502, b"<html>Bad Gateway</html>", "its answer with status 502 is not the API's"),
        (400, b'{"error": "no"}', "its answer with status 400 is not the API's"),
        (400, b'{"error": {"message": "too long"}}', "the server refused: too long"),
        (200, b"data: {half\n\n", "its answer with status 200 is not the API's"),
        (200, b"data: {}\n\n", "its answer with status 200 is not the API's"),
        (200, b'data: {"error": {"message": "died"}}\n\n', "the server refused: died"),
    ],
)
def test_whatever_else_answers_is_one_sentence(status: int, body: bytes, words: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    async def check() -> None:
        app = web.Application()
        app.add_routes([web.post("/chat/completions", answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        async with aiohttp.ClientSession() as session:
            speaker = Speaker(session, f"http://{host}:{port}", "tiny", "direct")
            with pytest.raises(PipelineError, match=words):
                [delta async for delta in speaker.deltas([{"role": "user", "content": "hi"}])]
        await runner.cleanup()

    asyncio.run(check())
