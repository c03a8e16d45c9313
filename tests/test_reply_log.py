"""The log: a line for each reply, for people or for programs, and no secret in it."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from asking import Refused, Server
from scripted import ScriptedEngine
from sqlalchemy import Engine

from pipeline.cli.log import JsonLines
from pipeline.serve.books.keys import Keys
from pipeline.serve.monitoring import reply_log

MESSAGES = [{"role": "user", "content": "a secret question"}]


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == reply_log.__name__]


def test_each_reply_has_one_line_without_a_word_of_it_or_its_key(
    serving: Any, books: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys(books)
    text = keys.create("mine")
    with serving(ScriptedEngine(["an ", "answer"]), keys=keys) as base:
        server = Server(f"{base}/v1", text)
        server.ask(True, messages=MESSAGES)
        server.ask(messages=MESSAGES)
        with pytest.raises(Refused):
            server.ask(messages=MESSAGES, model="nobody/knows-this")

    found = [json.loads(JsonLines().format(record)) for record in lines(caplog)]
    assert [(line["status"], line["streamed"]) for line in found] == [(200, True), (200, False)]
    for line in found:
        assert line["generation"].startswith("gen-")
        assert line["message"].startswith(f"{line['generation']} 200 local/tiny for sk-or-v1-")
        assert (line["key"], line["model"]) == (keys.all()[0].label, "local/tiny")
        assert (line["completion_tokens"], line["finish_reason"]) == (3, "stop")
        assert 0 <= line["first_token_ms"] <= line["latency_ms"]
    for word in (text, text[12:-3], "secret", "answer", "nobody"):
        assert word not in "".join(map(JsonLines().format, lines(caplog)))


def test_a_reply_that_fails_says_how(serving: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serving(ScriptedEngine(["a", "b"], fails_at=1)) as base:
        Server(f"{base}/v1").ask(True, messages=MESSAGES)

    (line,) = [json.loads(JsonLines().format(record)) for record in lines(caplog)]
    assert (line["status"], line["error_type"], line["key"]) == (502, "provider_unavailable", None)


def test_a_line_for_programs_is_one_line_whatever_is_in_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("any").exception("it was %s", "so\nbad")

    text = JsonLines().format(caplog.records[0])

    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["logger"], line["message"]) == ("error", "any", "it was so\nbad")
    assert line["traceback"].endswith("ValueError: two\nlines")
    assert line["time"].endswith("+00:00")


@pytest.mark.parametrize(("form", "code"), [("json", 0), ("text", 0), ("", 0), ("xml", 2)])
def test_the_environment_says_what_lines_look_like(form: str, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "keys", "list", "--books", str(tmp_path)]
    environment = {**os.environ, "PIPELINE_LOG": form}

    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert done.returncode == code
    assert ("PIPELINE_LOG=xml: give one of text, json" in done.stderr) == (code == 2)
