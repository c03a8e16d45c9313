"""A server elsewhere: our own, as it is, and others that do not behave."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from conftest import Serving
from scripted import ScriptedEngine

from pipeline.chat import Chat, ToolCall
from pipeline.errors import EngineDown, EngineError, EngineRefused, EngineTimeout
from pipeline.serve.asking.order import decide
from pipeline.serve.asking.request import ChatRequest, check_request
from pipeline.serve.books.database import open_books
from pipeline.serve.books.keys import Keys
from pipeline.serve.offer.catalog import Served, Upstream
from pipeline.serve.offer.price import Price
from pipeline.serve.replying.choices import Indexed, answer_all
from pipeline.serve.replying.events import Called, Ended, Said, Tally, Usage
from pipeline.serve.routing.upstream import Elsewhere

KEY = "sk-or-v1-secret"
QUESTION = [{"role": "user", "content": "hello there"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"const": None}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
SAID, ENDED = Said("answer", "hi"), Ended("stop", "stop")


def asking(**fields: Any) -> ChatRequest:
    return check_request({"messages": QUESTION, **fields})


def elsewhere(url: str, price: Price | None = None, **more: Any) -> Elsewhere:
    return Elsewhere(Upstream(url, KEY, "tiny", "Acme", price), **more)


async def answered(
    url: str, request: ChatRequest, tallies: Sequence[Tally] | None = None, **more: Any
) -> list[Indexed]:
    asked = elsewhere(url, **more)
    try:
        return [indexed async for indexed in asked.answer(request, tallies or [Tally()])]
    finally:
        await asked.close()


def joined(events: Sequence[Indexed]) -> list[Indexed]:
    """Bits of one channel in a row as one: where they are cut says nothing."""
    whole: list[Indexed] = []
    for index, event in events:
        same = [place for place, (other, _) in enumerate(whole) if other == index]
        last = whole[same[-1]][1] if same else None
        if isinstance(event, Said) and isinstance(last, Said) and event.channel == last.channel:
            whole[same[-1]] = (index, Said(event.channel, last.text + event.text))
        else:
            whole.append((index, event))
    return whole


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reasoning": {"enabled": False}},
        {"reasoning": {"exclude": True}},
        {"max_tokens": 6},
        {"stop": "wor"},
        {"n": 3},
        {"tools": [TOOL]},
        {"messages": None, "prompt": "hello there"},
    ],
    ids=str,
)
def test_a_reply_of_our_own_server_is_what_it_would_be_here(
    fields: dict[str, Any], serving: Serving, chat: Chat
) -> None:
    chunks = ["<think>", "\nI ", "must\n", "</think>", "\n\n", "Hello", " wor", "ld", CALL]
    request, engine = asking(**fields), ScriptedEngine(chunks)
    here = decide(request, Served("tiny", chat, ScriptedEngine(chunks), 0))
    own, others = [[Tally() for _ in range(here.num_choices)] for _ in range(2)]

    async def answer_here() -> list[Indexed]:
        events = answer_all(here, chat, ScriptedEngine(chunks), own)
        return [
            (index, replace(event, stop=None) if isinstance(event, Ended) else event)
            async for index, event in events
            if here.shows_reasoning or getattr(event, "channel", "") != "reasoning"
        ]

    with serving(engine) as url:
        events = asyncio.run(answered(f"{url}/api/v1/", request, others))

    assert sorted(joined(events), key=by_choice) == sorted(
        joined(asyncio.run(answer_here())), key=by_choice
    )
    assert others[0].cost_picodollars == 0
    assert others[0].usage == Usage(
        own[0].usage.prompt_tokens,
        sum(tally.usage.completion_tokens for tally in own),
        sum(tally.usage.reasoning_tokens for tally in own),
        own[0].usage.cached_tokens,
    )
    assert [vars(sampling) for _, sampling in engine.asked[:1]] == [
        vars(here.sampling) | {"max_tokens": engine.asked[0][1].max_tokens}
    ]


def by_choice(indexed: Indexed) -> int:
    return indexed[0]


def test_who_stops_listening_stops_the_engine_elsewhere(serving: Serving) -> None:
    engine = ScriptedEngine(["word "] * 500, delay_s=0.01)

    async def leave() -> None:
        asked = elsewhere(f"{url}/api/v1")
        async with aclosing(
            asked.answer(asking(reasoning={"enabled": False}), [Tally()])
        ) as events:
            await anext(events)
            assert engine.num_open == 1
        for _ in range(500):
            if not engine.num_open:
                break
            await asyncio.sleep(0.01)
        await asked.close()

    with serving(engine) as url:
        asyncio.run(leave())

    assert engine.num_open == 0
    assert engine.num_given < 500


def test_our_own_failures_come_as_what_they_are(serving: Serving, tmp_path: Path) -> None:
    direct = {"reasoning": {"enabled": False}}
    with serving(ScriptedEngine(["a", "b"], fails_at=1)) as url:
        broken = failed(f"{url}/api/v1", **direct)
        refused = failed(f"{url}/api/v1", **direct, logit_bias={"99999": 1})
    with (
        open_books(str(tmp_path / "books.sqlite")) as books,
        serving(ScriptedEngine(), keys=Keys(books)) as url,
    ):
        unknown = failed(f"{url}/api/v1")

    assert (type(broken), "Provider returned error" in str(broken)) == (EngineError, True)
    assert (type(refused), "logit_bias" in str(refused)) == (EngineRefused, True)
    assert (type(unknown), "401" in str(unknown)) == (EngineError, True)


def failed(url: str, **fields: Any) -> EngineError:
    with pytest.raises(EngineError) as failure:
        asyncio.run(answered(url, asking(**fields)))
    return failure.value


class Fake:
    """Answers with these parts, whatever it is asked; keeps what that was."""

    def __init__(
        self,
        *parts: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        pause_s: float = 0.0,
        cuts: bool = False,
    ) -> None:
        self.parts = parts
        self.status = status
        self.headers = headers or {}
        self.pause_s = pause_s
        self.cuts = cuts
        self.asked: list[tuple[str, Any, str | None]] = []

    async def respond(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.path, body, request.headers.get("Authorization")))
        response = web.StreamResponse(status=self.status, headers=self.headers)
        await response.prepare(request)
        for part in self.parts:
            await response.write(part)
            await asyncio.sleep(self.pause_s)
        if self.cuts:
            assert request.transport is not None
            request.transport.abort()
        return response

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.add_routes([web.route("*", "/{path:.*}", self.respond)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        try:
            yield f"http://{host}:{port}/api/v1"
        finally:
            await runner.cleanup()

    def tell(self, request: ChatRequest | None = None, **more: Any) -> tuple[list[Indexed], Tally]:
        return asyncio.run(self.telling(request or asking(), **more))

    async def telling(self, request: ChatRequest, **more: Any) -> tuple[list[Indexed], Tally]:
        tally = Tally()
        async with self.serving() as url:
            return await answered(url, request, [tally], **more), tally


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(finish: str | None = None, native: str | None = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "native_finish_reason": native}
    return event({"choices": [choice]})


def usage(**more: Any) -> bytes:
    counts = {"prompt_tokens": 40, "completion_tokens": 129}
    cached, reasoning = {"cached_tokens": 5}, {"reasoning_tokens": 31}
    details = {"prompt_tokens_details": cached, "completion_tokens_details": reasoning}
    return event({"choices": [], "usage": counts | details | more})


def failure(code: Any) -> bytes:
    error = {"code": code, "message": f"bad luck with {KEY}\nat line 3"}
    return event({"error": error, "choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]})


HI, END, DONE = chunk(content="hi"), chunk("stop", content=""), b"data: [DONE]\n\n"


def test_the_upstream_is_asked_for_its_model_and_told_nothing_of_our_books() -> None:
    fields = {
        "temperature": 0.5,
        "stop": "x",
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"const": None}},
        },
        "reasoning": {"effort": "low"},
        "seed": 3,
        "web_search_options": {"a": None},
    }
    own = {
        "model": "local/mine",
        "models": ["local/other"],
        "provider": {"order": ["acme"]},
        "plugins": [{"id": "response-healing"}],
        "transforms": ["middle-out"],
        "session_id": "s",
        "user": "u",
        "metadata": {"a": "b"},
        "trace": {"trace_id": "t"},
        "debug": {"echo_upstream_body": True},
        "logprobs": True,
        "top_logprobs": 2,
        "top_p": None,
    }
    fake = Fake(HI, END, usage(), DONE)

    fake.tell(asking(**fields, **own))

    ((path, body, key),) = fake.asked
    assert path == "/api/v1/chat/completions"
    assert key == f"Bearer {KEY}"
    assert body == {
        **fields,
        "stop": ["x"],
        "messages": QUESTION,
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True},
        "usage": {"include": True},
    }


def test_what_is_ignored_there_is_named() -> None:
    async def names(**fields: Any) -> tuple[str, ...]:
        asked = elsewhere("http://127.0.0.1:1")
        await asked.close()
        return asked.ignored(asking(**fields))

    assert asyncio.run(names(logprobs=True, top_logprobs=2)) == ("logprobs", "top_logprobs")
    assert asyncio.run(names(seed=1)) == ()


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
        {"reasoning_content": "hm"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "hm"}]},
    ],
    ids=lambda delta: "+".join(delta),
)
def test_reasoning_is_read_from_any_of_its_fields_once(delta: dict[str, Any]) -> None:
    events, _ = Fake(chunk(content="", **delta), HI, END, usage(), DONE).tell()

    assert events == [(0, Said("reasoning", "hm")), (0, SAID), (0, ENDED)]


def test_calls_are_put_together_and_told_before_the_end() -> None:
    parts = [
        {"index": 0, "id": "call_a", "type": "function", "function": {"name": "f"}},
        {"index": 0, "function": {"arguments": '{"city": "Ro'}},
        {"index": 1, "id": "call_b", "function": {"name": "g", "arguments": ""}},
        {"index": 0, "function": {"arguments": 'me"}'}},
    ]
    deltas = [chunk(content=None, tool_calls=[part]) for part in parts]

    events, _ = Fake(HI, *deltas, chunk("stop", "STOP"), usage(), DONE).tell()

    assert events == [
        (0, SAID),
        (0, Called(0, ToolCall("f", '{"city": "Rome"}'))),
        (0, Called(1, ToolCall("g", "{}"))),
        (0, Ended("tool_calls", "STOP")),
    ]


def test_a_call_that_was_cut_off_is_none() -> None:
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"city": "Ro'}}

    events, _ = Fake(chunk(tool_calls=[call]), chunk("length"), DONE).tell()

    assert events == [(0, Ended("length", "length"))]


def test_a_call_whose_arguments_are_no_json_is_a_failure() -> None:
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "Rome"}}

    with pytest.raises(EngineError, match="Acme called a tool with arguments that are no JSON"):
        Fake(chunk(tool_calls=[call]), chunk("tool_calls"), DONE).tell()


@pytest.mark.parametrize(
    ("said", "native", "finish"),
    [
        ("length", "max_tokens", "length"),
        ("content_filter", "SAFETY", "content_filter"),
        ("tool_calls", None, "stop"),
        ("eos", None, "stop"),
    ],
)
def test_how_it_ended_is_told_in_our_words_and_in_theirs(
    said: str, native: str | None, finish: str
) -> None:
    events, _ = Fake(HI, chunk(said, native), DONE).tell()

    assert events[-1] == (0, Ended(finish, native or said))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cost", "picodollars"),
    [
        (5.36e-05, 53_600_000),
        (0.1 + 0.2, 300_000_000_000),
        (2.5e-13, 0),
        (3, 3 * 10**12),
        (0, 0),
        (None, None),
        (True, None),
        (-1, None),
        (1e300, None),
        ("much", None),
    ],
)
def test_usage_and_the_cost_to_the_picodollar(cost: Any, picodollars: int | None) -> None:
    events, tally = Fake(HI, END, usage(cost=cost), DONE).tell()

    assert events == [(0, SAID), (0, ENDED)]
    assert tally == Tally(Usage(40, 129, 31, 5), picodollars)


def test_a_price_of_ours_makes_the_cost_ours() -> None:
    _, tally = Fake(HI, END, usage(cost=1), DONE).tell(price=Price(1, 2))

    assert tally == Tally(Usage(40, 129, 31, 5), None)


@pytest.mark.parametrize("counts", [{"prompt_tokens": -1}, {"prompt_tokens": "7"}, {}, None])
def test_a_reply_without_usage_is_whole_and_has_none(counts: Any) -> None:
    last = event({"choices": [], "usage": counts})

    assert Fake(HI, END, last, DONE).tell() == ([(0, SAID), (0, ENDED)], Tally())
    assert Fake(HI, END).tell() == ([(0, SAID), (0, ENDED)], Tally())


def test_the_end_comes_after_the_usage_that_belongs_to_it() -> None:
    async def read() -> Usage:
        tally = Tally()
        async with Fake(HI, END, usage(), DONE, pause_s=0.02).serving() as url:
            asked = elsewhere(url)
            async with aclosing(asked.answer(asking(), [tally])) as events:
                async for _, told_event in events:
                    if isinstance(told_event, Ended):
                        break
            await asked.close()
        return tally.usage

    assert asyncio.run(read()).completion_tokens == 129


def test_other_spellings_of_a_stream_are_read_however_it_is_cut() -> None:
    stream = (
        b": OPENROUTER PROCESSING\r\n\r\nevent: message\r\nid: 1\r\n"
        + HI.replace(b"data: ", b"data:").replace(b"\n", b"\r\n")
        + END.replace(b"\n", b"\r\n")
        + usage()
        + DONE
    )

    whole = Fake(stream).tell()
    bytewise = Fake(*(stream[place : place + 1] for place in range(len(stream)))).tell()

    assert whole == bytewise == ([(0, SAID), (0, ENDED)], Tally(Usage(40, 129, 31, 5)))


def test_a_usage_chunk_that_repeats_the_end_ends_once() -> None:
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}
    choice = {"index": 0, "delta": {"content": "no"}, "finish_reason": "tool_calls"}
    repeat = event({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})

    events, tally = Fake(chunk(tool_calls=[call]), chunk("tool_calls"), repeat, DONE).tell()

    assert events == [(0, Called(0, ToolCall("f", "{}"))), (0, Ended("tool_calls", "tool_calls"))]
    assert tally.usage == Usage(1, 2)


def test_calls_without_numbers_begin_at_their_ids() -> None:
    parts: list[Any] = [
        {"id": "a", "function": {"name": "f", "arguments": '{"a"'}},
        {"function": {"arguments": ": 1}"}},
        {"id": "b", "function": {"name": "g", "arguments": "{}"}},
    ]
    deltas = [chunk(tool_calls=[part]) for part in parts]

    events, _ = Fake(*deltas, chunk("tool_calls"), DONE).tell()

    calls = [told.call for _, told in events if isinstance(told, Called)]
    assert calls == [ToolCall("f", '{"a": 1}'), ToolCall("g", "{}")]


def test_counts_that_cannot_be_are_cut_to_what_can() -> None:
    details = {"cached_tokens": 900}, {"reasoning_tokens": 900}
    more = {"prompt_tokens_details": details[0], "completion_tokens_details": details[1]}

    _, tally = Fake(HI, END, usage(**more), DONE).tell()

    assert tally.usage == Usage(40, 129, 129, 40)


def test_a_text_is_sent_to_be_continued_and_not_as_a_dialogue() -> None:
    choice = {"index": 0, "text": "hi", "finish_reason": "stop"}
    fake = Fake(event({"choices": [choice]}), DONE)

    events, _ = fake.tell(asking(messages=None, prompt="say"))

    ((path, body, _),) = fake.asked
    assert events == [(0, SAID), (0, ENDED)]
    assert path == "/api/v1/completions"
    assert body["prompt"] == "say"
    assert "messages" not in body


def test_after_the_end_nobody_waits_for_a_connection_that_stays_open() -> None:
    events, _ = Fake(HI + END + usage() + DONE, pause_s=0.6).tell(silence_s=0.2)

    assert events == [(0, SAID), (0, ENDED)]


@pytest.mark.parametrize(
    ("fake", "kind", "what"),
    [
        (Fake(b'{"error": {"message": "no"}}', status=400), EngineRefused, "no"),
        (Fake(b"<html>", status=413), EngineRefused, "it gave no reason"),
        (Fake(b'{"error": {"message": "who?"}}', status=401), EngineError, "who?"),
        (Fake(b'{"error": {"message": "poor"}}', status=402), EngineError, "poor"),
        (Fake(b'{"error": {"message": "busy"}}', status=429), EngineDown, "busy"),
        (Fake(b"<html>", status=503), EngineDown, "503"),
        (Fake(b"<html>", status=502), EngineError, "502"),
        (Fake(failure(429)), EngineDown, "bad luck"),
        (Fake(failure(400)), EngineRefused, "bad luck"),
        (Fake(failure("server_error")), EngineError, "bad luck"),
        (Fake(b'{"choices": []}'), EngineError, "too early"),
        (Fake(b"data: {nonsense\n\n"), EngineError, "not a JSON object"),
        (Fake(b"data: [1]\n\n"), EngineError, "not a JSON object"),
        (Fake(b": wait\n\n", cuts=True), EngineError, "does not answer"),
        (Fake(b": wait\n\n", pause_s=0.6), EngineTimeout, "said nothing"),
    ],
    ids=lambda value: None if isinstance(value, Fake) else str(value),
)
def test_a_failure_before_the_first_word_is_told_by_its_kind(
    fake: Fake, kind: type[EngineError], what: str
) -> None:
    with pytest.raises(EngineError, match=what) as failed:
        fake.tell(silence_s=0.2)

    assert type(failed.value) is kind
    assert "Acme" in str(failed.value)
    assert KEY not in str(failed.value)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("fake", "what"),
    [
        (Fake(HI, failure(503)), "bad luck"),
        (Fake(HI, failure(400)), "bad luck"),
        (Fake(HI, chunk("error")), "broke its answer off"),
        (Fake(HI), "too early"),
        (Fake(HI, DONE), "too early"),
        (Fake(HI, cuts=True), "does not answer"),
        (Fake(HI, b"data: {nonsense\n\n"), "not a JSON object"),
        (Fake(HI, HI, pause_s=0.6), "said nothing"),
    ],
    ids=lambda value: None if isinstance(value, Fake) else str(value),
)
def test_a_failure_in_the_middle_comes_after_what_was_said(fake: Fake, what: str) -> None:
    async def read() -> list[Indexed]:
        events: list[Indexed] = []
        async with fake.serving() as url:
            asked = elsewhere(url, silence_s=0.2)
            replies = asked.answer(asking(), [Tally()])
            events.append(await anext(replies))
            with pytest.raises(EngineError, match=what) as failed:
                await anext(replies)
            assert type(failed.value) is (EngineTimeout if fake.pause_s else EngineError)
            await asked.close()
        return events

    assert asyncio.run(read()) == [(0, SAID)]


@pytest.mark.parametrize(
    ("header", "wait_s"), [("7", 7), ("999999", 3600), ("9" * 5000, 3600), ("soon", 1)]
)
def test_when_to_come_back_is_the_upstreams_word(header: str, wait_s: int) -> None:
    with pytest.raises(EngineDown) as down:
        Fake(b"{}", status=429, headers={"Retry-After": header}).tell()

    assert down.value.retry_after_s == wait_s


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_followed_by_no_request(status: int) -> None:
    other = Fake(HI, END, DONE)

    async def ask() -> tuple[EngineError, bool]:
        async with other.serving() as target:
            to = {"Location": f"{target}/chat/completions"}
            async with Fake(status=status, headers=to).serving() as url:
                asked = elsewhere(url)
                with pytest.raises(EngineError) as failed:
                    await anext(asked.answer(asking(), [Tally()]))
                is_well = await asked.is_healthy()
                await asked.close()
                return failed.value, is_well

    error, is_well = asyncio.run(ask())

    assert str(status) in str(error)
    assert not is_well
    assert other.asked == []


def test_whether_it_is_well_is_asked_once_in_a_while_also_by_many() -> None:
    fake = Fake(b'{"data": []}')

    async def check() -> list[bool]:
        async with fake.serving() as url:
            asked = elsewhere(url)
            answers = await asyncio.gather(*(asked.is_healthy() for _ in range(5)))
            await asked.close()
            return list(answers)

    assert asyncio.run(check()) == [True] * 5
    assert [path for path, _, _ in fake.asked] == ["/api/v1/models"]


def test_one_that_is_not_there_is_not_well() -> None:
    async def check() -> bool:
        asked = elsewhere("http://127.0.0.1:1/api/v1")
        is_well = await asked.is_healthy()
        with pytest.raises(
            EngineError, match=r"Acme at .*:1/api/v1 does not answer \(Client.*Error\)"
        ):
            await anext(asked.answer(asking(), [Tally()]))
        await asked.close()
        return is_well

    assert not asyncio.run(check())


def test_neither_key_nor_words_get_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    Fake(HI, END, usage(), DONE).tell()
    with pytest.raises(EngineError):
        Fake(HI, failure(500)).tell()

    assert KEY not in caplog.text
    assert "hello there" not in caplog.text
    assert KEY not in repr(Upstream("u", KEY, "m", "p"))
