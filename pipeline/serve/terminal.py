"""`pipeline chat`: talk to a running server in the terminal."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
from rich.console import Console

from pipeline.chat import Message, Mode
from pipeline.errors import PipelineError


def talk(url: str, key: str, model: str, mode: Mode, console: Console) -> None:
    """Read lines and stream replies until the input ends; `url` ends in /v1, as for any client."""
    asyncio.run(_talk(url, key, model, mode, console))


async def _talk(url: str, key: str, model: str, mode: Mode, console: Console) -> None:
    history: list[Message] = []
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None), headers={"Authorization": f"Bearer {key}"}
    ) as session:
        speaker = Speaker(session, url, model, mode)
        await speaker.check()
        while True:
            try:
                line = console.input("[bold]> [/bold]").strip()
            except EOFError:
                return
            if line:
                history.append({"role": "user", "content": line})
                history.append(await _show(speaker, history, console))


async def _show(speaker: "Speaker", history: list[Message], console: Console) -> Message:
    """Print a reply as it comes, its reasoning dimmed; give it as the next message."""
    reasoning, content = "", ""
    async for delta in speaker.deltas(history):
        thought, said = delta.get("reasoning") or "", delta.get("content") or ""
        if said and reasoning and not content:
            console.print("\n")
        console.print(thought, end="", style="dim", markup=False, highlight=False)
        console.print(said, end="", markup=False, highlight=False)
        reasoning, content = reasoning + thought, content + said
    console.print("\n")
    return {"role": "assistant", "reasoning": reasoning, "content": content}


class Speaker:
    """A client of one server's chat."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, mode: Mode) -> None:
        self._session = session
        self._model = model
        self._url = url.rstrip("/")
        self._mode = mode

    async def check(self) -> None:
        """PipelineError unless a server is there."""
        try:
            async with self._session.get(f"{self._url}/models") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError as error:
            raise PipelineError(
                f"no server answers at {self._url}: start one with `pipeline serve runs/NAME`"
            ) from error
        raise PipelineError(f"{self._url} is not the API's address; it ends in /api/v1")

    async def deltas(self, messages: list[Message]) -> AsyncIterator[dict[str, Any]]:
        """The deltas of the reply to a conversation."""
        body = {
            "model": self._model,
            "messages": messages,
            "stream": True,
            "reasoning": {"enabled": self._mode == "thinking"},
        }
        try:
            async with self._session.post(f"{self._url}/chat/completions", json=body) as response:
                if response.status != 200:
                    raise _failed(_parse(await response.read()), response.status)
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        chunk = _parse(line[len(b"data: ") :])
                        if "error" in chunk or "choices" not in chunk:
                            raise _failed(chunk, response.status)
                        for choice in chunk["choices"]:
                            yield choice["delta"]
        except aiohttp.ClientError as error:
            raise PipelineError(f"the server at {self._url} has gone: {error}") from error


def _parse(text: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for anything else, such as a proxy's HTML."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _failed(answer: dict[str, Any], status: int) -> PipelineError:
    try:
        what = answer["error"]["message"]
    except (LookupError, TypeError):
        what = f"its answer with status {status} is not the API's"
    return PipelineError(f"the server refused: {what}")
