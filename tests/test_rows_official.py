"""Every row of any conversation is what transformers makes of it with the official template.

The messages for transformers are the generator's own: nothing of the code under test is in them.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from conversations import BLANKS, Message, Talk, talks, texts
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.base.qwen3 import qwen3_dialogue
from pipeline.chat import Chat
from pipeline.data.conversation import Conversation, Record
from pipeline.data.dump import dump_rows
from pipeline.data.formats import detect, parse
from pipeline.data.notes import Notes
from pipeline.data.prepare import prepare
from pipeline.data.rows import Row, make_rows
from pipeline.errors import DataError
from pipeline.recipe import Data

ESCAPE = "\U0010fffd"  # a private character the code under test uses; nobody else knows it


@dataclass(frozen=True)
class Expected:
    """A row as transformers renders it: its text, and its ids if no literal is in the text."""

    prompt: str
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]
    turn: int
    mode: str


class Official:
    """transformers with a checkpoint's files."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.control: dict[str, int] = self._tokenizer.get_added_vocab()
        self.literals = [*self.control, ESCAPE]
        self._pattern = re.compile("|".join(map(re.escape, self.literals)))

    def text(self, messages: list[Message], tools: Any, mode: str | None) -> str:
        rendered = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=mode is not None,
            enable_thinking=mode != "direct",
        )
        assert isinstance(rendered, str)
        return rendered

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def rows(self, talk: Talk, turns: str = "all", thinking: str = "per_row") -> list[Expected]:
        """The rows of a conversation, one for each turn that is trained."""
        messages = talk.messages
        if thinking == "never":
            messages = [
                message | ({"reasoning_content": ""} if message["role"] == "assistant" else {})
                for message in messages
            ]
        roles = [message["role"] for message in messages]
        places = [
            place
            for place, role in enumerate(roles)
            if role == "assistant" and "user" in roles[:place] and place not in talk.untrained
        ]
        rows = [
            self.row(messages[: place + 1], talk.tools)
            for place in (places[-1:] if turns == "last" else places)
        ]
        return [row for row in rows if thinking != "always" or row.mode == "thinking"]

    def row(self, messages: list[Message], tools: Any) -> Expected:
        """The last of some messages as inference meets it; ValueError if it never would."""
        mode = "thinking" if messages[-1].get("reasoning_content") else "direct"
        prompt = self.text(messages[:-1], tools, mode)
        whole = self.text(messages, tools, None)
        if not whole.startswith(prompt):
            raise ValueError(f"message {len(messages) - 1}")
        assert whole.endswith("<|im_end|>\n")
        completion = whole[len(prompt) : -1]
        ids = self.ids(prompt), self.ids(completion)
        return Expected(prompt, completion, *ids, len(messages) - 1, mode)

    def in_words(self, value: Any) -> Any:
        """A JSON-like value with an ordinary word for each literal in it."""
        if isinstance(value, str):
            return self._pattern.sub(lambda m: f"word{self.literals.index(m[0])}word", value)
        if isinstance(value, list):
            return [self.in_words(item) for item in value]
        if isinstance(value, dict):
            return {self.in_words(key): self.in_words(item) for key, item in value.items()}
        return value

    def in_literals(self, text: str) -> str:
        """The text that `in_words` was given."""
        return re.sub(r"word(\d+)word", lambda m: self.literals[int(m[1])], text)

    def control_ids(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self.control.values()]


@dataclass(frozen=True)
class Base:
    """A checkpoint's dialogue files, as the code under test and as transformers read them."""

    folder: Path
    chat: Chat
    official: Official
    is_real: bool

    def hold(self, law: Callable[..., None], share: float, *drawn: Any) -> None:
        """Try a law on so many of this base's examples."""
        settings(
            max_examples=max(5, int(share * (700 if self.is_real else 50))),
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        )(given(*drawn)(law))()

    def plain_talks(self) -> st.SearchStrategy[Talk]:
        return talks(without=self.official.literals)

    def literal_talks(self) -> st.SearchStrategy[Talk]:
        return talks(literals=self.official.literals)


@pytest.fixture(scope="module", params=["bytes", pytest.param("qwen3", marks=pytest.mark.node)])
def base(request: pytest.FixtureRequest, chat_folder: Path) -> Base:
    """A byte vocabulary, and Qwen3's real tokenizer."""
    is_real = request.param == "qwen3"
    folder = qwen3_dialogue() if is_real else chat_folder
    return Base(folder, Chat(folder), Official(folder), is_real)


def conversation_of(record: Any) -> Conversation:
    read = Record(record, Path("chats.jsonl"), 7)
    sample = parse(read, detect(read))
    assert isinstance(sample, Conversation)
    return sample


def rows_of(base: Base, record: Any, **more: Any) -> list[Row]:
    data = Data(**{"sources": [{"path": "x"}], "max_tokens": 10**6} | more)
    return make_rows(conversation_of(record), base.chat, data, 42, Notes())


def assert_official(rows: list[Row], expected: list[Expected]) -> None:
    """The same turns, modes, prompts and labels, id by id."""
    assert [(row.turn, row.mode) for row in rows] == [(row.turn, row.mode) for row in expected]
    for row, theirs in zip(rows, expected, strict=True):
        assert row.prompt_ids == theirs.prompt_ids
        assert row.completion_ids == theirs.completion_ids
        assert row.source == "chats.jsonl:7"


def composed(text: str) -> str:
    """Qwen3's tokenizer composes accents, so that is how they come back."""
    return normalize("NFC", text)


def test_ids_and_labels_of_any_conversation_are_the_official_ones(base: Base) -> None:
    def law(talk: Talk) -> None:
        assert_official(rows_of(base, talk.record), base.official.rows(talk))

    base.hold(law, 1, base.plain_talks())


def test_control_tokens_that_somebody_wrote_are_text_and_only_the_templates_own_are_control(
    base: Base,
) -> None:
    official = base.official

    def law(talk: Talk) -> None:
        words = replace(
            talk, messages=official.in_words(talk.messages), tools=official.in_words(talk.tools)
        )
        rows, expected = rows_of(base, talk.record), official.rows(words)
        assert [(row.turn, row.mode) for row in rows] == [(row.turn, row.mode) for row in expected]
        for row, theirs in zip(rows, expected, strict=True):
            for ids, text, their_ids in (
                (row.prompt_ids, theirs.prompt, theirs.prompt_ids),
                (row.completion_ids, theirs.completion, theirs.completion_ids),
            ):
                assert composed(base.chat.decode(ids)) == composed(official.in_literals(text))
                assert official.control_ids(ids) == official.control_ids(their_ids)

    base.hold(law, 1, base.literal_talks())


def test_the_template_itself_sees_literals_as_the_text_they_are(base: Base) -> None:
    """What words stand for above is what the official template makes of the literals.

    But for a question that looks like a tool's result to it: that stays a question with us.
    """
    official = base.official

    def law(talk: Talk) -> None:
        asked = [m["content"] for m in talk.messages if m["role"] == "user"]
        assume(not any(text.startswith("<tool_response>") for text in asked))
        words = official.text(official.in_words(talk.messages), official.in_words(talk.tools), None)
        assert official.in_literals(words) == official.text(talk.messages, talk.tools, None)

    base.hold(law, 0.1, base.literal_talks())


def test_the_trained_turns_are_those_the_recipe_asks_for(base: Base) -> None:
    def law(talk: Talk, turns: str, thinking: str) -> None:
        rows = rows_of(base, talk.record, turns=turns, thinking=thinking)
        assert_official(rows, base.official.rows(talk, turns, thinking))

    turns, thinking = (
        st.sampled_from(["all", "last"]),
        st.sampled_from(["per_row", "never", "always"]),
    )
    base.hold(law, 0.3, base.plain_talks(), turns, thinking)


def shortened(talk: Talk, place: int) -> Iterator[list[Message]]:
    """Messages up to a turn, with ever more of the oldest turns left out after the system's."""
    messages = talk.messages[: place + 1]
    yield messages
    head = [m["role"] == "system" for m in messages].index(False)
    for start in range(head + 1, place):
        if messages[start]["role"] == "user":
            yield messages[:head] + messages[start:]


def test_a_row_too_long_is_left_out_or_loses_its_oldest_turns_and_is_never_cut(base: Base) -> None:
    def size(row: Expected) -> int:
        return len(row.prompt_ids) + len(row.completion_ids)

    def law(talk: Talk, share: float) -> None:
        whole = base.official.rows(talk)
        limit = max(1, int(share * max(map(size, whole))))
        split = []
        for row in whole:
            shorter = (base.official.row(m, talk.tools) for m in shortened(talk, row.turn))
            split += [replace(s, turn=row.turn) for s in shorter if size(s) <= limit][:1]
        kept = rows_of(base, talk.record, max_tokens=limit)
        assert_official(kept, [row for row in whole if size(row) <= limit])
        cut = rows_of(base, talk.record, max_tokens=limit, overlong="split_history")
        assert_official(cut, split)

    base.hold(law, 0.1, base.plain_talks(), st.floats(0, 1))


def with_more(talk: Talk, *messages: Message) -> Talk:
    """A conversation that goes on, in both forms."""
    wild = talk.record["messages"]
    wild = json.loads(wild) if isinstance(wild, str) else wild
    record = talk.record | {"messages": [*wild, *messages]}
    return replace(talk, record=record, messages=[*talk.messages, *messages])


def test_a_very_long_turn_is_whole(base: Base) -> None:
    def law(talk: Talk, text: str, number: int) -> None:
        long = f"So{text} " * number
        more = {"role": "user", "content": long}, {"role": "assistant", "content": long}
        talk = with_more(talk, *more)
        rows = rows_of(base, talk.record, turns="last")
        assert_official(rows, base.official.rows(talk, "last"))
        assert len(rows[0].completion_ids) > number

    said = texts((), without=base.official.literals)
    base.hold(law, 0.02, base.plain_talks(), said, st.integers(1_000, 10_000))


def test_two_answers_in_a_row_are_refused_where_the_template_cannot_express_them(
    base: Base,
) -> None:
    """Without reasoning the first has an empty block as the last message, and none before one."""

    def law(talk: Talk, reasoning: str) -> None:
        more: list[Message] = [{"role": "user", "content": "So?"}]
        more += [{"role": "assistant", "content": "Yes.", "reasoning_content": reasoning}]
        talk = with_more(talk, *more, {"role": "assistant", "content": "No."})
        if reasoning.strip():
            assert_official(rows_of(base, talk.record), base.official.rows(talk))
            return
        place = f"message {len(talk.messages) - 1}"
        with pytest.raises(ValueError, match=f"^{place}$"):
            base.official.rows(talk)
        with pytest.raises(DataError, match=rf"^chats\.jsonl:7: {place}: "):
            rows_of(base, talk.record)

    base.hold(law, 0.05, base.plain_talks(), st.sampled_from(["Why?", ""]))


def test_an_assistant_turn_that_says_nothing_is_refused_by_its_line(base: Base) -> None:
    def law(talk: Talk, content: Any) -> None:
        silent = {"role": "assistant", "content": content, "tool_calls": [], "train": False}
        talk = with_more(talk, {"role": "user", "content": "So?"}, silent)
        place = len(talk.messages) - 1
        with pytest.raises(DataError, match=rf"^chats\.jsonl:7: message {place}: "):
            rows_of(base, talk.record)

    blank = st.sampled_from(BLANKS)
    parts = blank.map(lambda text: [{"type": "text", "text": text}])
    blocks = blank.map(lambda text: f"<think>Why?</think>{text}")
    base.hold(law, 0.05, base.plain_talks(), blank | parts | blocks | st.none() | st.just([]))


def collect(strategy: st.SearchStrategy[Talk], number: int) -> list[Talk]:
    """Generated conversations, many at once."""
    found: list[Talk] = []

    @settings(max_examples=number, phases=[Phase.generate], database=None, deadline=None)
    @given(strategy)
    def add(talk: Talk) -> None:
        found.append(talk)

    add()
    return found


def test_the_rows_on_disk_are_the_official_ones_and_each_conversation_is_in_one_part(
    base: Base, tmp_path: Path
) -> None:
    drawn = collect(base.plain_talks(), 300 if base.is_real else 60)
    source, out = tmp_path / "chats.jsonl", tmp_path / "data"
    lines = [
        json.dumps(talk.record, ensure_ascii=number % 2 == 0) for number, talk in enumerate(drawn)
    ]
    source.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    data = Data(sources=[{"path": str(source)}], eval={"share": 0.2}, max_tokens=10**6)

    report = prepare(data, base.folder, 42, out)
    dumped = tmp_path / "rows.jsonl"
    dump_rows({part: out / f"{part}.arrow" for part in ("train", "eval")}, dumped)

    found, parts = defaultdict(list), defaultdict(set)
    for line in dumped.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        parts[row["source"]].add(row.pop("part"))
        found[row.pop("source")].append(row)
    for number, talk in enumerate(drawn, start=1):
        assert found.pop(f"{source}:{number}") == [
            {
                "input_ids": row.prompt_ids + row.completion_ids,
                "labels": [-100] * len(row.prompt_ids) + row.completion_ids,
                "turn": row.turn,
                "mode": row.mode,
            }
            for row in base.official.rows(talk)
        ], talk
    assert not found
    counted = Counter(part for in_parts in parts.values() for part in in_parts)
    assert sum(counted.values()) == len(drawn)
    assert counted == {part: report[part]["conversations"] for part in ("train", "eval")}


def as_sharegpt(talk: Talk) -> dict[str, Any]:
    """The same conversation with `from` and `value`; a call is an item of its own."""
    turns: list[dict[str, Any]] = []
    for place, message in enumerate(talk.messages):
        mark = {"train": False} if place in talk.untrained else {}
        thought = {"reasoning": message.get("reasoning_content", "")}
        role = {"user": "human", "assistant": "gpt", "tool": "observation"}.get(message["role"])
        turns.append({"from": role or "system", "value": message["content"]})
        if role == "gpt":
            turns[-1] |= mark | thought
        turns += [
            {"from": "function_call", "value": json.dumps(call["function"])}
            for call in message.get("tool_calls", ())
        ]
    return {"conversations": turns, "tools": json.dumps(talk.tools or [])}


def test_a_conversation_in_sharegpts_shape_has_the_same_rows(base: Base) -> None:
    def law(talk: Talk) -> None:
        assert rows_of(base, as_sharegpt(talk)) == rows_of(base, talk.record)

    base.hold(law, 0.1, base.plain_talks())


def test_a_prompt_and_its_completion_have_the_rows_of_the_completion(base: Base) -> None:
    def law(talk: Talk, choice: int) -> None:
        wild = with_more(talk).record["messages"]
        rows = base.official.rows(talk)
        places = [row.turn for row in rows if wild[row.turn - 1]["role"] != "system"]
        assume(places)
        place = places[choice % len(places)]
        record = talk.record | {"prompt": wild[:place], "completion": wild[place:]}
        record.pop("messages")
        assert_official(rows_of(base, record), [row for row in rows if row.turn >= place])

    base.hold(law, 0.1, base.plain_talks(), st.integers(0, 5))


def test_questions_and_answers_as_alpaca_or_plain_texts_have_the_same_rows(base: Base) -> None:
    def law(pairs: list[tuple[str, str]], system: str, more: str, reasoning: str) -> None:
        *history, (instruction, answer) = pairs
        question = f"{instruction}\n{more}" if more.strip() else instruction
        messages: list[Message] = [{"role": "system", "content": system}]
        for asked, answered in [*history, (question, answer)]:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        messages[-1] |= {"reasoning_content": reasoning}
        output = f"<think>\n{reasoning}\n</think>\n\n{answer}"
        record = {"system": system, "history": [list(pair) for pair in history]}
        record |= {"instruction": instruction, "input": more, "output": output}
        rows = base.official.rows(Talk({}, messages, None))
        assert_official(rows_of(base, record), rows)
        (row,) = base.official.rows(Talk({}, messages[-2:], None))
        assert_official(rows_of(base, {"prompt": question, "completion": output}), [row])

    said = texts((), without=base.official.literals).map(lambda text: f"{text}so")
    pairs = st.lists(st.tuples(said, said), min_size=1, max_size=4)
    base.hold(law, 0.2, pairs, said, said | st.sampled_from(BLANKS), said)
