"""The benchmark of the gateway: what its load counts, and the whole of it over a tiny tokenizer."""

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from pipeline.bench.gateway import RESULT, bench_gateway, table
from pipeline.bench.gateway_load import Streamed, Target, ask_at_once
from pipeline.errors import PipelineError

OK = b"HTTP/1.1 200 OK\r\n\r\n"
EVENTS = b"9\r\n: hello\n\n\r\n9\r\ndata: {}\n\n\r\n12\r\ndata: {}\n\ndata: {}\n\n\r\n"
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def ask(answer: bytes, size: int) -> Streamed:
    """Of a server that sends so many bytes at a time."""

    async def run() -> Streamed:
        ended = asyncio.Event()

        async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"{}")
            for place in range(0, len(answer), size):
                writer.write(answer[place : place + size])
                await asyncio.sleep(0.001)
            with contextlib.suppress(ConnectionResetError):  # the load hangs up
                await reader.read()
            writer.close()
            ended.set()

        async with await asyncio.start_server(send, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            try:
                (told,) = await ask_at_once(Target("it", f"http://127.0.0.1:{port}/x", {}), [{}])
            finally:
                await ended.wait()
            return told

    return asyncio.run(asyncio.wait_for(run(), 10))


@pytest.mark.parametrize("size", [3, 20, 1000])
def test_events_are_counted_however_the_connection_cuts_them(size: int) -> None:
    assert ask(OK + EVENTS + END, size).num_events == 3


@pytest.mark.parametrize(
    "answer", [b'HTTP/1.1 400 No\r\n\r\n{"no": 1}', OK + EVENTS + b"0\r\n\r\n"]
)
def test_a_reply_that_is_no_whole_stream_is_no_measurement(answer: bytes) -> None:
    with pytest.raises(PipelineError, match="it gave no stream"):
        ask(answer, 1000)


@pytest.mark.slow
def test_all_ways_are_measured_and_the_one_that_is_not_there_is_named(
    chat_folder: Path, tmp_path: Path
) -> None:
    result = bench_gateway(chat_folder, tmp_path / "litellm", [1, 2], 1, tmp_path)

    ways = ["engine", "ours", "forwarder"]
    assert [(s.way, s.streams) for s in result.starts] == [(w, n) for n in (1, 2) for w in ways]
    assert all(0 < start.p50_ms <= start.p99_ms for start in result.starts)
    replies = {(flow.way, flow.reply) for flow in result.flows}
    inside = "ours, engine inside"
    assert replies == {(way, "plain") for way in [*ways, inside]} | {
        (way, "phases") for way in ("ours", inside)
    }
    assert all(flow.per_s > 0 and flow.per_cpu_s > 0 for flow in result.flows)
    assert json.loads((tmp_path / RESULT).read_text(encoding="utf-8"))["left_out"]
    assert "LiteLLM's proxy is left out" in table(result)
