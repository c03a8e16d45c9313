"""Prompts tokenised together: each its own ids, in few calls, whatever happens to the others."""

import asyncio
import shutil
import sys
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import ScriptedEngine
from tokenizers import Tokenizer

from pipeline.chat import Chat
from pipeline.chat.token_cache import TokenCache
from pipeline.engine.protocol import Lane
from pipeline.errors import RequestError
from pipeline.serve.asking.batch_tokenizer import MAX_PROMPTS, BatchTokenizer
from pipeline.serve.asking.order import Order, decide
from pipeline.serve.asking.request import ChatRequest
from pipeline.serve.offer.catalog import Served
from pipeline.serve.routing.endpoint import Own

T = TypeVar("T")


class Panic(BaseException):
    """What Rust's are in Python."""


class CountedChat(Chat):
    """Says how often it was called, and waits at first until it may go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.batches: list[int] = []
        self.may_go_on = threading.Event()
        self.breaks_at = ""

    def encode_all(self, rendered: Sequence[str]) -> list[list[int]]:
        self.batches.append(len(rendered))
        self.may_go_on.wait(10)
        if self.breaks_at in rendered:
            raise Panic(self.breaks_at)
        return super().encode_all(rendered)


def within_a_minute(work: Coroutine[Any, Any, T]) -> T:
    """What nobody tells its ids waits for ever."""
    return asyncio.run(asyncio.wait_for(work, 60))


@pytest.fixture
def counted(chat_folder: Path) -> CountedChat:
    return CountedChat(chat_folder)


def test_those_that_wait_are_tokenised_in_few_calls(counted: CountedChat, chat: Chat) -> None:
    async def run() -> list[list[int]]:
        tokenizer = BatchTokenizer()
        first = asyncio.create_task(tokenizer.encode(counted, ["first"]))
        while not counted.batches:
            await asyncio.sleep(0)
        wanted = [tokenizer.encode(counted, [f"text {n}", "end"]) for n in range(30)]
        others = asyncio.gather(*wanted, tokenizer.encode(chat, ["another's"]))
        await asyncio.sleep(0)
        counted.may_go_on.set()
        return [await first, *await others]

    first, *others, foreign = within_a_minute(run())

    assert counted.batches == [1, 2 * MAX_PROMPTS, 2 * (30 - MAX_PROMPTS)]
    assert first == chat.encode("first")
    assert others == [chat.encode(f"text {n}") + chat.encode("end") for n in range(30)]
    assert foreign == chat.encode("another's")


def test_who_hangs_up_takes_nothing_from_the_others(counted: CountedChat, chat: Chat) -> None:
    async def run() -> list[list[int]]:
        tokenizer = BatchTokenizer()
        tasks = [asyncio.create_task(tokenizer.encode(counted, [f"{n}"])) for n in range(4)]
        await asyncio.sleep(0)
        tasks[0].cancel()  # the one that began the work
        counted.may_go_on.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        return [*found[1:], await tokenizer.encode(counted, ["later"])]  # type: ignore[list-item]

    texts = ["1", "2", "3", "later"]
    assert within_a_minute(run()) == [chat.encode(text) for text in texts]


def test_a_failure_is_told_to_those_of_its_batch_alone(counted: CountedChat, chat: Chat) -> None:
    counted.may_go_on.set()
    counted.breaks_at = "bad"

    async def run() -> None:
        tokenizer = BatchTokenizer()
        with pytest.raises(RuntimeError, match="the tokenizer has failed") as failure:
            await tokenizer.encode(counted, ["bad"])
        assert isinstance(failure.value.__cause__, Panic)
        assert await tokenizer.encode(counted, ["good"]) == chat.encode("good")

    within_a_minute(run())


def test_short_prompts_do_not_wait_for_long_ones(chat: Chat) -> None:
    """Which have the threads of the event loop, as many as there are."""
    may_end = threading.Event()

    async def run() -> list[int]:
        long = [asyncio.create_task(asyncio.to_thread(may_end.wait, 60)) for _ in range(40)]
        await asyncio.sleep(0.1)
        found = await BatchTokenizer().encode(chat, ["short"])
        assert not may_end.is_set()
        may_end.set()
        assert all(await asyncio.gather(*long))
        return found

    assert within_a_minute(run()) == chat.encode("short")


def test_it_works_in_one_event_loop_after_another(counted: CountedChat, chat: Chat) -> None:
    """Also where the first was left in the middle of its work."""
    tokenizer = BatchTokenizer()

    async def leave() -> None:
        waiting = asyncio.create_task(tokenizer.encode(counted, ["a"]))
        while not counted.batches:
            await asyncio.sleep(0)
        waiting.cancel()
        threading.Timer(0.1, counted.may_go_on.set).start()

    within_a_minute(leave())

    assert within_a_minute(tokenizer.encode(counted, ["b"])) == chat.encode("b")


def test_a_busy_endpoint_decides_what_an_idle_one_does(counted: CountedChat) -> None:
    """One after another, and many at a time while another reply is made; refusals alike."""
    counted.may_go_on.set()
    served = Served("tiny", counted, ScriptedEngine(), 0)
    user = {"role": "user", "content": "Is <|im_end|> a tag?"}
    bodies = [
        {"messages": [user], "include_reasoning": False, "stop": ["</think>", "x"]},
        {"messages": [{"role": "system", "content": "Be <brief>."}, user], "n": 2, "stop": "</s>"},
        {"messages": [user, {"role": "assistant", "content": "Yes, <think>"}], "seed": 1},
        {"prompt": "<|im_start|>once \U0010fffd\ue000 upon", "logprobs": True, "max_tokens": 5},
        {"messages": [{**user, "name": "Ann"}], "reasoning": {"effort": "low"}},
        {"messages": [user] * 30, "transforms": ["middle-out"]},
    ]
    requests = [ChatRequest.model_validate(body) for body in bodies]
    refused = ChatRequest.model_validate({"messages": [user], "max_tokens": 100_000})
    lane = Lane(cache_salt="s")

    async def run() -> list[Order]:
        own = Own(served)
        async with served.door.entered():
            with pytest.raises(RequestError, match="context length is 1000 tokens"):
                await own.order(refused, lane)
            return await asyncio.gather(*(own.order(r, lane) for r in requests * 3))

    orders = within_a_minute(run())

    assert orders == [decide(request, served, lane) for request in requests * 3]
    assert [order.is_compressed for order in orders] == [*[False] * 5, True] * 3
    num_texts = 1 + 3 * (len(requests) + 1)  # the refused one's; one has begun its answer
    assert sum(counted.batches) == num_texts


class WatchedChat(Chat):
    """Knows which threads have rendered."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.threads: list[threading.Thread] = []

    def render(self, *some: Any) -> str:
        self.threads.append(threading.current_thread())
        return super().render(*some)

    @property
    def are_main(self) -> list[bool]:
        return [thread is threading.main_thread() for thread in self.threads]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [{"role": "user", "content": "x"}] * 33},
        {"messages": [{"role": "user", "content": "x" * 8192}]},
        {"logit_bias": {str(token): 1 for token in range(40)}},
        {f"unknown_{number}": 1 for number in range(40)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_takes_long_is_decided_beside_the_loop(
    chat_folder: Path, fields: dict[str, Any]
) -> None:
    """Also where nobody else is there to wait for it."""
    chat, engine = WatchedChat(chat_folder), ScriptedEngine()
    engine.context_tokens = 20_000
    served = Served("tiny", chat, engine, 0)
    short = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]})
    request = ChatRequest.model_validate({**short.model_dump(exclude_unset=True), **fields})

    async def run() -> None:
        await Own(served).order(short, Lane())
        await Own(served).order(request, Lane())

    within_a_minute(run())

    assert chat.are_main == [True, False]


def test_compressing_is_done_beside_the_loop(chat_folder: Path) -> None:
    chat = WatchedChat(chat_folder)
    messages = [{"role": "user", "content": "x" * 50}] * 30
    fields = {"messages": messages, "transforms": ["middle-out"]}
    own = Own(Served("tiny", chat, ScriptedEngine(), 0))

    order = within_a_minute(own.order(ChatRequest.model_validate(fields), Lane()))

    assert order.is_compressed
    first, *others = chat.are_main
    assert first
    assert not any(others)


def test_what_a_tokenizer_file_says_of_batches_changes_no_prompt(
    chat: Chat, chat_folder: Path, tmp_path: Path
) -> None:
    """Some were saved after a batch was padded, and cut to a length."""
    shutil.copytree(chat_folder, tmp_path / "saved")
    padded = Tokenizer.from_file(str(chat_folder / "tokenizer.json"))
    padded.enable_padding()
    padded.enable_truncation(8)
    padded.save(str(tmp_path / "saved" / "tokenizer.json"))
    texts = [
        "a",
        "as long as this",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>user\nHo<|im_end|>",
    ]

    assert Chat(tmp_path / "saved").encode_all(texts) == [chat.encode(text) for text in texts]


LITERALS = ["<|im_end|>", "<|im_start|>", "<think>", "\U0010fffd", "\ue000", "\n", "é", "a"]
BITS = st.lists(st.sampled_from(LITERALS), max_size=8).map("".join)


@given(st.lists(BITS, max_size=6))
def test_many_texts_at_once_have_the_ids_of_each(chat: Chat, contents: list[str]) -> None:
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": content}
        for place, content in enumerate(contents)
    ]
    rendered = [chat.render(messages[: end + 1], None, "direct") for end in range(len(messages))]
    fresh = [chat.verbatim(content) for content in contents]

    found = chat.encode_all([*rendered, *fresh, *rendered])

    assert found == [chat.encode(text) for text in [*rendered, *fresh, *rendered]]


@given(BITS)
def test_a_text_that_means_its_control_tokens_is_taken_verbatim(chat: Chat, text: str) -> None:
    ids = chat.encode(chat.verbatim(text))

    assert chat.decode(ids) == text
    if "\U0010fffd" not in text:
        assert ids == chat.reply_ids(text)


def of_length(texts: Sequence[str]) -> list[list[int]]:
    return [[len(text)] for text in texts]


def test_the_latest_texts_are_remembered_and_no_more() -> None:
    cache, asked = TokenCache(2, 5), list[str]()

    def encode(texts: Sequence[str]) -> list[list[int]]:
        asked.extend(texts)
        return of_length(texts)

    assert cache.ids(["a", "bb", "a"], encode) == [[1], [2], [1]]
    assert cache.ids(["a", "ccc"], encode) == [[1], [3]]  # bb has to go: a was asked for since
    assert cache.ids(["a", "bb"], encode) == [[1], [2]]
    assert cache.ids(["too long"] * 2, encode) == [[8], [8]]
    assert cache.ids(["too long"], encode) == [[8]]
    assert asked == ["a", "bb", "ccc", "bb", "too long", "too long"]


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_threads_may_share_what_is_remembered() -> None:
    cache = TokenCache(4, 100)

    def work(begin: int) -> bool:
        texts = ["x" * (1 + (begin * n) % 7) for n in range(5000)]
        return all(
            cache.ids(some, of_length) == of_length(some)
            for some in (texts[n : n + 3] for n in range(len(texts)))
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(1, 9)))
