"""`pipeline provider check`: an honest server passes, and each lie is found."""

import asyncio
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from asking import run_server
from conftest import Pipeline, Serving
from elsewhere import free_port, llamacpp_at
from honest import DONE, KEY, MODEL, NAMES, Honest
from scripted import ScriptedEngine

from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.probe import Finding, probe

Body = dict[str, Any]


async def found(url: str, key: str, model: str = "") -> list[Finding]:
    return [finding async for finding in probe(url, key, model)]


def collect(url: str, key: str) -> list[Finding]:
    return asyncio.run(found(url, key))


def check(server: Honest, key: str = KEY, model: str = "") -> list[Finding]:
    async def run() -> list[Finding]:
        async with server.served() as url:
            return await found(url, key, model)

    return asyncio.run(run())


def wrong(server: Honest) -> dict[str, str]:
    """Every check that has not passed."""
    return {f.check: f.verdict for f in check(server) if f.verdict != "passed"}


def test_a_server_that_does_all_it_declares_passes_every_check() -> None:
    findings = check(Honest())

    assert {finding.verdict for finding in findings} == {"passed"}, findings
    checks = " ".join(finding.check for finding in findings)
    assert [name for name in NAMES if name not in checks] == []


@pytest.mark.parametrize(
    ("ignored", "failed"),
    [
        ("max_tokens", "max_tokens"),
        ("max_completion_tokens", "max_completion_tokens"),
        ("stop", "stop"),
        ("n", "n"),
        ("seed", "seed"),
        ("top_p", "top_p"),
        ("top_k", "top_k"),
        ("min_p", "min_p"),
        ("logit_bias", "logit_bias"),
        ("logprobs", "logprobs|logprobs: streamed|top_logprobs"),
        ("top_logprobs", "top_logprobs"),
        (
            "response_format",
            "response_format: json_object|structured_outputs: json_schema|"
            "structured_outputs: streamed",
        ),
        ("tool_choice", "tool_choice: one function|tool_choice: none"),
        ("parallel_tool_calls", "parallel_tool_calls"),
        ("reasoning", "reasoning"),
        ("reasoning_effort", "reasoning_effort"),
        ("include_reasoning", "include_reasoning"),
    ],
)
def test_a_parameter_that_is_declared_and_ignored_is_found(ignored: str, failed: str) -> None:
    assert wrong(Honest(ignores=ignored)) == dict.fromkeys(failed.split("|"), "failed")


@pytest.mark.parametrize("ignored", ["frequency_penalty", "presence_penalty", "repetition_penalty"])
def test_a_penalty_that_changes_nothing_is_not_called_proved(ignored: str) -> None:
    assert wrong(Honest(ignores=ignored)) == {ignored: "not shown"}


def test_a_server_that_draws_at_temperature_0_is_found() -> None:
    assert wrong(Honest(ignores="temperature"))["temperature"] == "failed"


def test_tools_that_are_never_called_are_found() -> None:
    found = wrong(Honest(ignores="tools"))

    failed = {"tool_choice: required", "tool_choice: streamed", "tool_choice: one function"}
    assert {name for name, verdict in found.items() if verdict == "failed"} == failed
    assert found["tools"] == "not shown"


def test_what_is_not_declared_is_not_asked_for() -> None:
    found = wrong(Honest(ignores="seed", names=[name for name in NAMES if name != "seed"]))

    assert found == {"seed": "not declared"}


def test_what_no_check_knows_is_named() -> None:
    assert wrong(Honest(names=[*NAMES, "verbosity"])) == {"verbosity": "not shown"}


def _without_usage(reply: Body) -> Body:
    return {key: value for key, value in reply.items() if key != "usage"}


def _of_another(reply: Body) -> Body:
    return reply | {"model": "acme/other"}


def _finish(finish: str) -> Callable[[Body], Body]:
    def bend(reply: Body) -> Body:
        return reply | {"choices": [reply["choices"][0] | {"finish_reason": finish}]}

    return bend


@pytest.mark.parametrize(
    ("bend", "failed"),
    [
        (_without_usage, "usage"),
        (lambda reply: reply | {"usage": reply["usage"] | {"total_tokens": 1}}, "usage"),
        (_of_another, "model"),
        (_finish("eos"), "reply"),
        (lambda _reply: {"text": "hello"}, "reply"),
        (lambda reply: reply | {"choices": ["hello"]}, "reply"),
        (lambda reply: reply | {"choices": {}}, "reply"),
    ],
)
def test_a_whole_reply_that_lacks_something_is_found(
    bend: Callable[[Body], Body], failed: str
) -> None:
    assert wrong(Honest(bend=bend))[failed] == "failed"


def _lacking_finish(frames: list[Any]) -> list[Any]:
    """The way vLLM sends them: the key is there at the end only."""
    first, *rest = frames
    choice = {key: first["choices"][0][key] for key in ("index", "delta")}
    return [first | {"choices": [choice]}, *rest]


@pytest.mark.parametrize(
    ("bend", "failed"),
    [
        (lambda frames: [*frames[:-2], DONE], "usage"),
        (lambda frames: [*frames[:-2], frames[-2], frames[-2], DONE], "usage"),
        (lambda frames: [frames[-2], *frames[:-2], DONE], "usage"),
        (_lacking_finish, "finish_reason"),
        (lambda frames: [*frames[:2], *frames[3:]], "finish_reason"),
        (lambda frames: frames[:-1], "frames"),
        (lambda frames: [*frames, *frames[-2:]], "frames"),
        (lambda frames: [b"event: chunk\n\n", *frames], "frames"),
        (lambda frames: [b"data: oops\n\n", *frames], "frames"),
        (lambda frames: [frames[0] | {"id": "gen-2"}, *frames[1:]], "frames"),
        (lambda frames: [frames[0] | {"error": {"code": 502}}, *frames[1:]], "frames"),
        (lambda frames: [_of_another(frames[0]), *frames[1:]], "model"),
        (lambda _frames: [DONE], "frames"),
        (lambda frames: [{"choices": ["hello"]}, *frames], "frames"),
        (lambda frames: [{"id": "gen-1"}, *frames], "frames"),
    ],
)
def test_a_stream_that_breaks_a_rule_is_found(
    bend: Callable[[list[Any]], list[Any]], failed: str
) -> None:
    assert wrong(Honest(bend_frames=bend))[f"stream: {failed}"] == "failed"


def test_a_stream_of_another_type_is_found() -> None:
    found = wrong(Honest(stream_type="text/plain"))

    assert found == {"stream: content type": "failed"}


def test_a_stream_that_goes_on_when_it_was_left_is_found() -> None:
    assert wrong(Honest(tells_cancelled=False)) == {"stream: cancellation": "failed"}


def test_a_server_that_lets_everybody_in_is_found() -> None:
    assert wrong(Honest(is_open=True)) == {"no key": "failed", "wrong key": "failed"}


OF_REFUSALS = [
    "no key",
    "wrong key",
    "unknown model",
    "body that is no JSON",
    "field of a wrong type",
]


@pytest.mark.parametrize(
    "bend",
    [
        lambda answer: web.Response(text="<p>no", content_type="text/html", status=answer.status),
        lambda answer: web.json_response({"detail": "no"}, status=answer.status),
        lambda answer: web.json_response({"error": "no"}, status=answer.status),
        lambda answer: web.json_response(["no"], status=answer.status),
    ],
)
def test_a_refusal_of_another_shape_is_found(bend: Callable[[web.Response], web.Response]) -> None:
    assert wrong(Honest(bend_refusal=bend)) == dict.fromkeys(OF_REFUSALS, "failed")


def _with_wait(answer: web.Response) -> web.Response:
    if answer.status == 429:
        answer.headers["Retry-After"] = "2"
    return answer


def _eighth(status: int) -> Callable[[Body], int | None]:
    """Of the many at once, which may have eight tokens, one in eight is refused."""
    asked = iter(range(1000))

    def refuses(body: Body) -> int | None:
        return status if body.get("max_tokens") == 8 and next(asked) % 8 == 0 else None

    return refuses


def test_who_is_asked_too_much_must_say_when_to_come_again() -> None:
    early = check(Honest(refuses=_eighth(429), bend_refusal=_with_wait))

    assert {finding.verdict for finding in early} == {"passed"}
    seen = next(finding.seen for finding in early if finding.check == "many at once")
    assert seen == "32 at once: 28 × 200, 4 × 429"
    assert wrong(Honest(refuses=_eighth(429))) == {"many at once": "failed"}
    assert wrong(Honest(refuses=_eighth(500))) == {"many at once": "failed"}


@pytest.mark.parametrize(
    "bend",
    [
        lambda document: document | {"colour": "blue"},
        lambda document: {key: document[key] for key in document if key != "name"},
        lambda document: document | {"quantization": "q4_k_m"},
        lambda document: document | {"datacenters": [{"country_code": "Germany"}]},
        lambda document: document | {"passthrough_parameters": {"a": {"type": "object"}}},
        lambda document: document | {"passthrough_parameters": {"a": {"type": "enum"}}},
        lambda document: (
            document | {"passthrough_parameters": {"a": {"type": "boolean", "min": 0}}}
        ),
        lambda document: (
            document
            | {
                "input_modalities": [
                    {
                        "type": "text",
                        "pricing": [{"type": "prompt", "unit": "token", "cost_usd": "5e-08"}],
                    }
                ]
            }
        ),
    ],
)
def test_a_document_that_a_router_would_drop_is_found(bend: Callable[[Body], Body]) -> None:
    assert wrong(Honest(bend_document=bend)) == {"models document": "failed"}


def test_our_own_server_passes(serving: Serving, tmp_path: Path) -> None:
    engine = ScriptedEngine(["The ", "sea ", "is ", "deep", "."] * 4, delay_s=0.005)
    engine.context_tokens = 4000
    with open_books(str(tmp_path)) as books, closing(Ledger(books)) as ledger:
        keys = Keys(books)
        with serving(engine, keys=keys, ledger=ledger) as url:
            findings = collect(f"{url}/api/v1", keys.create("router"))

    assert [finding for finding in findings if finding.verdict == "failed"] == []
    assert findings[0].seen == "local/tiny: schema 2.4 of 1 models"
    passed = {finding.check for finding in findings if finding.verdict == "passed"}
    assert {"no key", "stream: usage", "stream: cancellation", "many at once"} <= passed
    assert {"max_tokens", "stop"} <= passed


@pytest.mark.slow
@pytest.mark.node
def test_all_we_declare_over_a_real_engine_acts(golden: Path, tmp_path: Path) -> None:
    with run_server(golden, tmp_path / "books.sqlite", "--engine", "llamacpp") as server:
        findings = collect(server.url, server.key)

    assert {f.check: f.seen for f in findings if f.verdict != "passed"} == {"n": ""}
    assert findings[0].seen == f"{server.model}: schema 2.4 of 1 models"


@pytest.mark.slow
def test_a_server_that_declares_nothing_is_asked_all_the_same(tiny_gguf: Path) -> None:
    port = free_port()
    with llamacpp_at(port, tiny_gguf):
        findings = collect(f"http://127.0.0.1:{port}/v1", "")

    verdicts = {finding.check: finding.verdict for finding in findings}
    assert verdicts["models document"] == "failed"
    assert verdicts["no key"] == "failed"
    assert verdicts["stream: content type"] == "passed"
    assert verdicts["seed"] == "not declared"


def test_the_command_prints_a_table_and_its_exit_code_tells(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "200")

    async def run(server: Honest) -> Any:
        async with server.served() as url:
            arguments = ("provider", "check", url, "--key-env", "MY_KEY", "--model", MODEL)
            return await asyncio.to_thread(pipeline, *arguments)

    honest, liar = asyncio.run(run(Honest())), asyncio.run(run(Honest(ignores="stop")))

    assert (honest.code, liar.code) == (0, 3)
    assert "32 at once" in honest.out
    assert "1 of 45 checks failed: stop" in liar.err


def test_who_does_not_answer_and_what_is_not_listed_is_one_sentence(pipeline: Pipeline) -> None:
    nobody = pipeline("provider", "check", "http://127.0.0.1:9/v1")

    assert (nobody.code, nobody.out) == (2, "")  # no table of nothing
    assert nobody.err.startswith("error: it does not answer")
    with pytest.raises(Exception, match="acme/other is not listed; there are acme/tiny"):
        check(Honest(), model="acme/other")
