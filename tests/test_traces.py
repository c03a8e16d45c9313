"""A request's spans, as a collector gets them: true, of the client's trace, and without a word."""

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from asking import CHAT, Refused, Server, chunks
from collector import Collector, collecting
from running import running
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.errors import PipelineError
from pipeline.serve.api.app import App
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.monitoring import traces as traces_module
from pipeline.serve.monitoring.traces import open_traces
from pipeline.serve.offer.catalog import Catalog, Served, Upstream

THOUGHT = ["<think>", "hmm", "</think>", "it ", "is"]
MESSAGES = [{"role": "user", "content": "a secret question"}]
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
SERVER, CLIENT = 2, 3
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Named in the environment."""
    with collecting() as found:
        monkeypatch.setenv(ENDPOINT, found.url)
        yield found


@contextmanager
def traced(
    chat: Chat, engine: ScriptedEngine, upstreams: tuple[Upstream, ...] = (), **more: Any
) -> Iterator[Server]:
    """Every span has been sent at its end."""
    served = Served("tiny", chat, engine, 0, upstreams=upstreams)
    with open_traces() as traces, running(App(Catalog([served]), traces=traces, **more)) as base:
        yield Server(f"{base}/api/v1", model="tiny")


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_is_a_span_with_its_model_its_id_and_its_tokens(
    collector: Collector, chat: Chat, stream: bool
) -> None:
    with traced(chat, ScriptedEngine(THOUGHT)) as server:
        body = {"messages": MESSAGES, "stream": stream, "model": "TINY"}
        with server.post(body) as response:
            response.read()
        usage = server.ask(messages=MESSAGES).usage

    span, *_ = [span for span in collector.spans if span.name == "chat local/tiny"]
    assert span.attributes.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert span.attributes == {
        "http.request.method": "POST",
        "http.route": "/api/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "Pipeline",
        "gen_ai.request.model": "local/tiny",
        "gen_ai.request.stream": stream,
        "gen_ai.response.id": response.headers["X-Generation-Id"],
        "gen_ai.response.model": "local/tiny",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.reasoning.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 3,
    }
    assert (span.kind, span.is_bad, span.parent_id) == (SERVER, False, "")
    assert span.service == "pipeline"


def test_what_it_took_lies_below_it(collector: Collector, chat: Chat) -> None:
    with traced(chat, ScriptedEngine(THOUGHT)) as server:
        server.ask(messages=MESSAGES)

    above = {
        "chat local/tiny": "",
        "ask Pipeline": collector["chat local/tiny"].id,
        "decide": collector["ask Pipeline"].id,
        "queue": collector["ask Pipeline"].id,
        "first token": collector["ask Pipeline"].id,
    }
    assert {span.name: span.parent_id for span in collector.spans} == above


def test_the_clients_trace_goes_on_here_and_in_the_server_that_is_asked(
    collector: Collector, chat: Chat
) -> None:
    client, body = {"traceparent": PARENT}, {"messages": MESSAGES}
    with traced(chat, ScriptedEngine(["there"])) as other:
        upstream = Upstream(other.url, "sk-or-v1-theirs", "tiny", "Acme")
        with traced(chat, ScriptedEngine(fails_at=0), (upstream,)) as server:
            request = urllib.request.Request(
                f"{server.url}{CHAT}", json.dumps(body).encode(), client
            )
            with urllib.request.urlopen(request) as response:
                assert response.status == 200

    ours, theirs = sorted(
        (span for span in collector.spans if span.name == "chat local/tiny"),
        key=lambda span: span.parent_id != PARENT[36:52],
    )
    assert {span.trace_id for span in collector.spans} == {PARENT[3:35]}
    assert ours.parent_id == PARENT[36:52]
    assert ours.attributes["gen_ai.provider.name"] == "Acme"
    assert theirs.parent_id == collector["ask Acme"].id
    assert collector["ask Acme"].kind == CLIENT
    failed, *_ = [span for span in collector.spans if span.parent_id == ours.id and span.is_bad]
    assert (failed.name, failed.attributes["error.type"]) == (
        "ask Pipeline",
        "provider_unavailable",
    )


def test_requests_behind_each_other_on_a_connection_are_apart(
    collector: Collector, chat: Chat
) -> None:
    body = json.dumps({"messages": MESSAGES}).encode()
    head = f"POST /v1{CHAT} HTTP/1.1\r\nhost: here\r\ncontent-length: {len(body)}\r\n\r\n"
    with traced(chat, ScriptedEngine(THOUGHT, delay_s=0.01)) as server:
        host, port = urlsplit(server.url).netloc.split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall((head.encode() + body) * 3)
            answers = b""
            while answers.count(b'"total_tokens"') < 3:
                answers += connection.recv(65536)

    spans = [span for span in collector.spans if span.name == "chat local/tiny"]
    assert [span.parent_id for span in spans] == [""] * 3


def test_no_word_no_key_and_no_header_is_told(
    collector: Collector, chat: Chat, tmp_path: Path
) -> None:
    with (
        open_books(str(tmp_path)) as books,
        closing(Ledger(books)) as ledger,
        traced(chat, ScriptedEngine(THOUGHT), keys=Keys(books), ledger=ledger) as nobodys,
    ):
        key = Keys(books).create("mine")
        server = Server(nobodys.url, key, "tiny")
        server.ask(messages=MESSAGES, user="a secret user")
        server.ask(True, messages=MESSAGES)
        for wrong in (
            {"model": "a secret model", "models": ["tiny"], "temperature": "a secret value"},
            {"model": "a secret model"},
        ):
            with pytest.raises(Refused):
                server.ask(messages=MESSAGES, **wrong)
        server.ask(messages=MESSAGES, model="a secret model", models=["tiny"])
        with pytest.raises(Refused):
            Server(server.url, "sk-or-v1-a secret").ask(messages=MESSAGES)

    assert collector.names.count("chat local/tiny") == 3
    assert collector.names.count("POST /api/v1/chat/completions") == 3
    for word in (key, key[9:], "secret", "hmm", "it is", "uthorization", "Bearer"):
        assert word not in collector.text


def test_what_fails_says_how_but_not_why(collector: Collector, chat: Chat) -> None:
    with traced(chat, ScriptedEngine(["a", "b"], fails_at=1)) as server:
        server.ask(True, messages=MESSAGES)
        with pytest.raises(Refused):
            server.ask(messages=[])

    late, early = collector["chat local/tiny"], collector["POST /api/v1/chat/completions"]
    assert [late.is_bad, late.attributes["error.type"]] == [True, "provider_unavailable"]
    assert late.attributes["http.response.status_code"] == 502
    assert [early.is_bad, early.attributes["error.type"]] == [True, "invalid_request"]
    assert early.attributes["http.response.status_code"] == 400


def test_a_client_that_hangs_up_ends_its_span(collector: Collector, chat: Chat) -> None:
    engine = ScriptedEngine(["word "] * 100_000, delay_s=0.01)
    with (
        traced(chat, engine) as server,
        server.post({"messages": MESSAGES, "stream": True}) as response,
    ):
        next(chunks(response))

    span = collector["chat local/tiny"]
    assert (span.is_bad, span.attributes["error.type"]) == (True, "cancelled")
    assert span.attributes["gen_ai.usage.output_tokens"] > 0


def test_a_collector_that_fails_or_is_not_there_disturbs_no_reply(
    collector: Collector, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setattr(traces_module, "FLUSH_S", 0.2)
    collector.status = 500
    for url in (collector.url, "http://127.0.0.1:1"):
        monkeypatch.setenv(ENDPOINT, url)
        with traced(chat, ScriptedEngine(THOUGHT)) as server:
            for _ in range(20):
                assert server.ask(True, messages=MESSAGES).answer == "it is"
    assert collector.num_answered, "or nothing was tried"


def test_a_collector_that_does_not_answer_holds_no_end_up(
    collector: Collector, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces_module, "FLUSH_S", 0.2)
    collector.holding = threading.Event()

    with traced(chat, ScriptedEngine(THOUGHT)) as server:
        server.ask(messages=MESSAGES)

    assert collector.num_answered == 0


def test_the_sampler_and_the_name_are_the_environments(
    collector: Collector, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    with traced(chat, ScriptedEngine(THOUGHT)) as server:
        server.ask(messages=MESSAGES)
    assert {span.service for span in collector.spans} == {"ours"}

    collector.spans.clear()
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    with traced(chat, ScriptedEngine(THOUGHT)) as server:
        server.ask(messages=MESSAGES)
    assert collector.spans == []


LOOK = """
import sys
import pipeline.serve.server
from pipeline.serve.monitoring.traces import open_traces

with open_traces() as traces:
    found = [name for name in sys.modules if name.startswith("opentelemetry")]
    sys.stdout.write(f"{traces} {len(found)}")
"""


@pytest.mark.parametrize(
    "said",
    [
        {},
        {ENDPOINT: ""},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
    ids=str,
)
def test_where_nobody_is_to_be_told_nothing_is_even_imported(said: dict[str, str]) -> None:
    environment = {name: text for name, text in os.environ.items() if "OTEL_" not in name}
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        env=environment | said | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("None 0", "")


def test_what_cannot_be_told_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
        with pytest.raises(PipelineError, match=r"is not installed: pip install '\.\[traces\]'"):
            open_traces().__enter__()
    with monkeypatch.context() as without:
        without.setenv(ENDPOINT, "collector:4318")
        with pytest.raises(PipelineError, match=r"ENDPOINT must begin with http:// or https://$"):
            open_traces().__enter__()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(PipelineError, match=r"PROTOCOL=grpc is not spoken here; set it to http/"):
        open_traces().__enter__()
