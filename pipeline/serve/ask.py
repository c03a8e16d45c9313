"""One question to a run, as a client would ask it: a server of its own, the official client."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from openai import APIError, OpenAI

from pipeline.chat import Mode
from pipeline.errors import EngineError, PipelineError
from pipeline.serve.offer.choice import Choice
from pipeline.serve.server import check
from pipeline.serve.settings import Settings

MODES: tuple[Mode, ...] = ("thinking", "direct")


def ask_both_modes(
    target: Path, question: str, system: str, choice: Choice = "auto"
) -> Iterator[tuple[Mode, str | None, str]]:
    """Mode, reasoning and answer of a question in each mode; the server is stopped at the end."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    # The server would refuse as well, but only we can say so with the right exit code.
    check(target, Settings(artefact=choice))
    with (
        _server(target, choice) as (url, key),
        OpenAI(base_url=url, api_key=key, max_retries=0) as client,
    ):
        for mode in MODES:
            yield mode, *_ask(client, messages, mode)


def _ask(client: OpenAI, messages: list[dict[str, str]], mode: Mode) -> tuple[str | None, str]:
    try:
        completion = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=256,
            temperature=0,
            extra_body={"reasoning": {"enabled": mode == "thinking"}},
        )
    except APIError as error:
        body = error.body if isinstance(error.body, dict) else {}
        what = body.get("message") or error.message
        raise PipelineError(f"the question was not answered in {mode} mode: {what}") from error
    message = completion.choices[0].message
    return getattr(message, "reasoning", None), message.content or ""


@contextmanager
def _server(target: Path, choice: Choice) -> Iterator[tuple[str, str]]:
    """Its base URL, and the key of its own books."""
    command = [sys.executable, "-m", "pipeline", "serve", str(target)]
    command += ["--port", "0", "--artefact", choice]
    with TemporaryDirectory(prefix="ask-") as books:
        command += ["--books", books]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                key, url = (server.stdout.readline().split() for _ in range(2))
                if not url:
                    raise EngineError(f"the server of {target} did not start; see above for why")
                yield url[2], key[1]
            finally:
                server.terminate()
