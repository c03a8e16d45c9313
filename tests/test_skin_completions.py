"""The legacy /completions: a text is continued, and told in the old form."""

import json
from typing import Any

import openai
import pytest
from asking import Server
from hypothesis import given
from hypothesis import strategies as st
from scripted import ScriptedEngine

from pipeline.chat import Chat
from pipeline.engine.protocol import TokenLogprob
from pipeline.errors import RequestError
from pipeline.serve.asking.constraints import Constraints
from pipeline.serve.asking.ignored import find_ignored
from pipeline.serve.offer.price import Cost
from pipeline.serve.replying.events import Ended, Event, Said, Usage
from pipeline.serve.schema.completions import TextWriter
from pipeline.serve.skins.completions import Completions
from pipeline.serve.skins.skin import Bill, Heading

SKIN = Completions()
BILL = Bill(Usage(10, 8, 0, 4), Cost(2_000_000, 3_000_000))
STOP = Ended("stop", "stop")
Indexed = tuple[int, Event]


def heading(chat: Chat, **fields: Any) -> Heading:
    return Heading("gen-1-a", 1767225600, "me/tiny", "Pipeline", chat, **fields)


def streamed(
    heading: Heading, events: list[Indexed], error: RequestError | None = None, echo: Any = None
) -> list[Any]:
    """The chunks of a stream."""
    writer = TextWriter(heading)
    frames = writer.begin(echo) + b"".join(writer.frames(*event) for event in events)
    frames += writer.finish(BILL) if error is None else writer.fail(error, BILL)
    comment, *told, done, end = frames.decode().split("\n\n")
    assert (comment, done, end) == (": OPENROUTER PROCESSING", "data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in told]


def whole(heading: Heading, events: list[Indexed], error: RequestError | None = None) -> Any:
    writer = TextWriter(heading)
    for event in events:
        writer.add(*event)
    return writer.body(BILL, error)


def test_a_prompt_is_a_text_or_a_list_of_one() -> None:
    for prompt in ("once", ["once"]):
        request = SKIN.read({"prompt": prompt, "max_tokens": 5, "stop": "x", "n": 2})
        assert (request.prompt, request.messages) == ("once", None)
        assert (request.max_tokens, request.stop, request.n) == (5, ["x"], 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": None}, "prompt: must be a text; token ids are not read"),
        ({"prompt": [1, 2]}, "prompt: must be a text; token ids are not read"),
        ({"prompt": []}, "prompt: is continued one at a time"),
        ({"prompt": ["a", "b"]}, "prompt: is continued one at a time; send a request for each"),
        ({"prompt": "a", "logprobs": True}, "logprobs: Input should be a valid integer"),
        ({"prompt": "a", "logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
        ({"prompt": "a", "messages": []}, "messages: only a prompt is continued"),
        ({"prompt": "a", "n": 9}, "n: Input should be less than or equal to 8"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SKIN.read(values)

    assert caught.value.status == 400
    assert str(caught.value).startswith(message)


def test_logprobs_are_a_number() -> None:
    for number in (0, 3):
        request = SKIN.read({"prompt": "a", "logprobs": number})
        assert (request.logprobs, request.top_logprobs) == (True, number)
    request = SKIN.read({"prompt": "a", "logprobs": None})
    assert (request.logprobs, request.top_logprobs) == (None, None)


def test_what_changes_nothing_is_named() -> None:
    request = SKIN.read({"prompt": "a", "echo": True, "suffix": "z", "best_of": 3, "user": "me"})

    assert find_ignored(request, frozenset(), Constraints()) == ["echo", "suffix", "best_of"]
    assert request.user == "me"


def test_a_stream_is_texts_an_end_and_the_usage(chat: Chat) -> None:
    chunks = streamed(
        heading(chat), [(0, Said("answer", "ye")), (0, Said("answer", "s")), (0, STOP)]
    )

    head = {"id": "gen-1-a", "object": "text_completion", "created": 1767225600}
    head |= {"model": "me/tiny", "provider": "Pipeline"}
    empty = {"index": 0, "logprobs": None, "finish_reason": None, "native_finish_reason": None}
    over = {"finish_reason": "stop", "native_finish_reason": "stop"}
    assert chunks[:3] == [
        {**head, "choices": [{**empty, "text": "ye"}]},
        {**head, "choices": [{**empty, "text": "s"}]},
        {**head, "choices": [{**empty, **over, "text": ""}]},
    ]
    assert chunks[3].pop("usage")["cost"] == 5e-06
    assert chunks[3:] == [{**head, "choices": []}]


def test_an_echo_comes_first_and_metadata_last(chat: Chat) -> None:
    [echo, usage] = streamed(heading(chat), [], echo={"prompt": [1]})
    body = TextWriter(heading(chat)).body(Bill(Usage(), metadata={"requested": "a"}), None)

    assert (echo["debug"], echo["choices"]) == ({"echo_upstream_body": {"prompt": [1]}}, [])
    assert body["openrouter_metadata"] == {"requested": "a"}
    assert "openrouter_metadata" not in usage


@given(st.data())
def test_what_is_streamed_adds_up_to_what_is_whole(chat: Chat, data: st.DataObject) -> None:
    tokens = st.builds(TokenLogprob, st.integers(0, chat.num_ids - 1), st.floats(-9, 0))
    said = st.builds(Said, st.just("answer"), st.text(max_size=3), st.lists(tokens).map(tuple))
    events = data.draw(st.lists(st.tuples(st.integers(0, 2), said)))
    events += [(index, STOP) for index in range(3)]
    both = heading(chat, num_choices=3, has_logprobs=True)
    *chunks, last = streamed(both, events)
    body = whole(both, events)

    assert last["usage"] == body["usage"]
    assert last["usage"]["total_tokens"] == 18
    for choice in body["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks]
        mine = [part for part in mine if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == "stop"
        for name, values in choice["logprobs"].items():
            parts = [part["logprobs"][name] for part in mine if part["logprobs"]]
            assert [value for part in parts for value in part] == values


def test_logprobs_are_lists_side_by_side(chat: Chat) -> None:
    ids = chat.text_ids("aé b")
    tokens = [TokenLogprob(id, -0.5, ((ids[0], -1.5), (ids[1], -2.5))) for id in ids]
    said = Said("answer", "aé b", tuple(tokens))
    [choice] = whole(heading(chat, has_logprobs=True), [(0, said), (0, STOP)])["choices"]

    parts = ["bytes:\\xc3", "bytes:\\xa9"]
    assert choice["logprobs"]["tokens"] == ["a", *parts, " ", "b"]
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * 5
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 3]
    likeliest = choice["logprobs"]["top_logprobs"]
    assert likeliest[0] == {"a": -0.5, parts[0]: -2.5}
    assert likeliest[4] == {"a": -1.5, parts[0]: -2.5, "b": -0.5}


def test_a_text_that_broke_off_is_kept(chat: Chat) -> None:
    error = RequestError("gone", 502, "provider_unavailable")
    events: list[Indexed] = [(0, Said("answer", "a"))]
    [choice] = whole(heading(chat), events, error)["choices"]
    *_, last = streamed(heading(chat), events, error)

    assert (choice["text"], choice["finish_reason"]) == ("a", "error")
    told = {"code": 502, "message": "gone", "metadata": {"error_type": "provider_unavailable"}}
    assert choice["error"] == last["error"] == told
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("", "error")


def test_a_failure_has_the_one_shape() -> None:
    gone = RequestError("a is gone", 404, "not_found")

    body = SKIN.error_body(gone, ["a"], {"requested": "a"})
    assert body.pop("openrouter_metadata") == {"requested": "a"}
    assert body == SKIN.error_body(gone, ["a"])
    assert (body["error"]["code"], body["error"]["message"]) == (404, "a is gone")


def test_the_official_client_continues_a_text(serving: Any, chat: Chat) -> None:
    engine = ScriptedEngine(["<think>", "a", "</think>", "\n", "b"], able=["logprobs"])
    with (
        serving(engine) as base,
        openai.OpenAI(base_url=f"{base}/api/v1", api_key="any", max_retries=0) as client,
    ):
        whole = client.completions.create(
            model="tiny", prompt=["<|im_start|>once"], n=2, logprobs=1, max_tokens=5
        )
        with client.completions.create(model="tiny", prompt="once", stream=True) as stream:
            chunks = list(stream)
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt=["a", "b"])

    assert [choice.text for choice in whole.choices] == ["<think>a</think>\nb"] * 2
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [-0.5] * 5
    assert engine.asked[0][0] == chat.reply_ids("<|im_start|>once")
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == "<think>a</think>\nb"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert "one at a time" in caught.value.message


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_before_the_first_token_is_an_http_error(serving: Any, stream: bool) -> None:
    asked = {"prompt": "once", "stream": stream}
    with (
        serving(ScriptedEngine(fails_at=0)) as base,
        Server(f"{base}/v1").post(asked, "/completions") as response,
    ):
        error = json.loads(response.read())["error"]

    assert (response.status, error["code"]) == (502, 502)
    assert error["metadata"] == {"error_type": "provider_unavailable"}


def test_what_belongs_to_a_dialogue_changes_nothing(serving: Any) -> None:
    asked = {"prompt": "once", "echo": True, "reasoning": {"effort": "low"}}
    with (
        serving(ScriptedEngine()) as base,
        Server(f"{base}/v1").post(asked, "/completions") as response,
    ):
        names = response.headers["X-Ignored-Parameters"]
        body = json.loads(response.read())

    assert names == "echo, reasoning"
    assert body["choices"][0]["text"] == "hello"
