"""Generated conversations, each as a file may hold it and as the official template takes it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Message = dict[str, Any]
FRAGMENTS = (
    *("Hello", " ", "  ", "\n", "\n\n", "\r\n", "\t", "a", "It's", "1234567", "0.5", "'ll", "- x"),
    *(
        "日本語",
        "天気は？",
        "مرحبا",
        "שלום",
        "한국",
        "\u1112\u1161\u11ab",
        "é",
        "e\u0301",
        "\u212b",
    ),
    *("\u0338", "ﬁ", "٣", "🙂", "👩‍👩‍👧", "🇨🇭", "\u200b", "\u200d", "\u202e", "\u2066", "\ufeff"),
    *("\u2028", "\x85", "\x00", "\x1f", "\ue000", "\ue001", "\uffff", "\U000e0041", "\ufffd"),
    *("<", ">", "|>", "<|im_", "end|>", "</", "think>", "<tool>", "&lt;", '"', "'", "\\", "\\n"),
    *("\\u003c", "{{ messages }}", "{% endif %}", "{#", "```py\nx  = 1\n```", "/think", "<br>"),
    *(
        "# Tools",
        "system\n",
        "user",
        "assistant\n",
        "null",
        '{"a": 1}',
        "[[",
        "%s",
        "\N{DEGREE SIGN}",
    ),
)
WRITTEN = (  # what a person may write about control tokens, or with them
    "The tags <think> and </think>",
    " <think>so</think>",
    "<|im_end|>\n<|im_start|>assistant\n",
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    "<tool_response>so</tool_response>",
)
LEAVES = (0, -1, 0.1, 1e-07, 1e22, 10**20, True, False, None, [], {}, [None, {"a": None}])
OPENINGS = (
    *((), ("system",), ("developer",), ("system", "system"), ("assistant",)),
    *(("system", "assistant"), ("developer", "system", "assistant")),
)
BLANKS = ("", " ", "\n", " \n\t\n")


@dataclass(frozen=True)
class Talk:
    """A conversation in both forms."""

    record: dict[str, Any]
    """As a line of a file."""
    messages: list[Message]
    """With content and reasoning as text, and arguments as objects: nothing left to interpret."""
    tools: list[dict[str, Any]] | None
    untrained: frozenset[int] = frozenset()
    """The places of the assistant messages that the file marks as context."""


def texts(literals: Sequence[str], without: Sequence[str] = ()) -> st.SearchStrategy[str]:
    """Text with every kind of character, some of the literals, and none of the others."""
    bits = st.sampled_from(FRAGMENTS)
    if literals:
        bits |= st.sampled_from((*literals, *WRITTEN))
    joined = st.lists(bits, max_size=4).map("".join)
    return joined.filter(lambda text: not any(each in text for each in without))


@st.composite
def talks(draw: st.DrawFn, literals: Sequence[str] = (), without: Sequence[str] = ()) -> Talk:
    """Conversations of one to six turns, with at least one answer to learn from.

    `literals` are control tokens that people and models write as text; texts hold none of
    `without`, whatever they are joined from.
    """
    script = _Script(draw, texts(literals, without))
    script.open()
    for _ in range(draw(st.integers(1, 6))):
        script.ask()
        for _ in range((0, 0, 0, 1, 1, 2)[script.pick(6)]):
            script.call()
        if script.pick(8) < 7:
            script.answer()
    if not script.has_trained:
        script.ask()
        script.answer(marked=False)
    if script.pick(8) == 7:
        script.ask()
    tools = script.tools()
    record = script.record(tools)
    return Talk(
        json.loads(json.dumps(record)), script.plain, tools or None, frozenset(script.untrained)
    )


class _Script:
    """A conversation that grows in both forms, message by message."""

    def __init__(self, draw: st.DrawFn, text: st.SearchStrategy[str]) -> None:
        self._draw, self._text = draw, text
        self._said = text.map(lambda words: words if words.strip() else words + "so")
        self._value = text | st.sampled_from(LEAVES) | st.dictionaries(text, text, max_size=2)
        self._object = st.dictionaries(text, self._value, max_size=3)
        self._thinks = draw(st.sampled_from((0, 2, 4)))  # never, now and then, always
        self.wild: list[Message] = []
        self.plain: list[Message] = []
        self.untrained: set[int] = set()
        self.has_trained = False

    def pick(self, number: int) -> int:
        """One of so many choices, from 0."""
        return self._draw(st.integers(0, number - 1))

    def open(self) -> None:
        """What may stand before the first question."""
        for role in self._draw(st.sampled_from(OPENINGS)):
            if role == "assistant":
                self.answer(is_context=True)
            else:
                self._add(role, self._draw(self._text))

    def ask(self) -> None:
        self._add("user", self._draw(self._text))
        if self.pick(12) == 11:
            self._add("system", self._draw(self._text))

    def call(self) -> None:
        calls = self._draw(st.lists(st.tuples(self._said, self._object), min_size=1, max_size=2))
        self.answer(calls)
        for _ in range(1 + self.pick(3)):
            self._add("tool", self._draw(self._text), name="f", tool_call_id="1")

    def _add(self, role: str, text: str, **more: Any) -> None:
        plain_role = "system" if role == "developer" else role
        self.plain.append({"role": plain_role, "content": text})
        if role == "tool" and self.pick(5) == 4:
            role = "function"
        self.wild.append({"role": role, "content": self._content(text), **more})

    def _content(self, text: str) -> Any:
        middle = len(text) // 2
        parts = [{"type": "text", "text": part} for part in (text[:middle], text[middle:])]
        return (text, text, parts, [{"type": "text", "text": text}], text or None)[self.pick(5)]

    def answer(
        self,
        calls: Sequence[tuple[str, dict[str, Any]]] = (),
        marked: bool = True,
        is_context: bool = False,
    ) -> None:
        """An assistant turn; some that say nothing but call, some that are marked as context."""
        says = not calls or self.pick(2)
        text = self._draw(self._said) if says else ""
        if text.lstrip().startswith("<think>"):  # which would be a block, not prose
            text = "The tag " + text
        reasoning = self._draw(self._said) if self.pick(4) < self._thinks else ""
        text, wild = self._thought(text, reasoning)
        plain: Message = {"role": "assistant", "content": text}
        # The template looks for a block in the content only where there is no reasoning at all.
        if reasoning or "</think>" in text:
            plain["reasoning_content"] = reasoning
        if calls:
            plain["tool_calls"] = [
                {"type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in calls
            ]
            wild |= self._calls(calls)
        wild |= self._mark(marked)
        if wild.get("train") is False or wild.get("weight") == 0:
            self.untrained.add(len(self.plain))
        elif not is_context:
            self.has_trained = True
        self.plain.append(plain)
        self.wild.append(wild)

    def _mark(self, marked: bool) -> Message:
        marks = ({}, {}, {}, {}, {"train": True}, {"weight": 1}, {"train": False}, {"weight": 0})
        return dict(marks[self.pick(8 if marked else 6)])

    def _thought(self, text: str, reasoning: str) -> tuple[str, Message]:
        """The text as the template is to have it, and the message with the reasoning in it."""
        form = self.pick(6)
        wild: Message = {"role": "assistant"}
        if form == 5 and "</think>" not in reasoning:
            end = ("", "\n", "\n\n")[self.pick(3)]
            text = text.lstrip("\n")
            block = f"<think>{end}{reasoning or end}{end}</think>{end}{text}"
            return text, wild | {"content": self._content(("", " \n")[self.pick(2)] + block)}
        middle = len(reasoning) // 2
        details: list[Message] = [{"type": "reasoning.text", "text": reasoning}]
        if form == 4:
            details = [
                {"type": "reasoning.text", "text": reasoning[:middle]},
                {"type": "reasoning.encrypted", "data": "x"},
                {"type": "reasoning.text", "text": reasoning[middle:], "signature": None},
            ]
        thought: tuple[Message, ...] = (
            {"reasoning_content": reasoning},
            {"reasoning": reasoning},
            {"reasoning_details": details},
            {"reasoning": reasoning, "reasoning_content": reasoning, "reasoning_details": []},
            {"reasoning": "an older summary", "reasoning_details": details},
        )
        unthought: tuple[Message, ...] = (
            {},
            {"reasoning": None},
            {"reasoning_content": BLANKS[self.pick(4)]},
            {"reasoning": BLANKS[self.pick(4)], "reasoning_details": []},
            {"reasoning": None, "reasoning_content": None, "reasoning_details": None},
        )
        fields = (thought if reasoning else unthought)[form % 5]
        return text, wild | {"content": self._content(text)} | fields

    def _calls(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> Message:
        if len(calls) == 1 and self.pick(8) == 7:
            name, arguments = calls[0]
            return {"function_call": {"name": name, "arguments": json.dumps(arguments)}}
        return {"tool_calls": [self._call(name, arguments) for name, arguments in calls]}

    def _call(self, name: str, arguments: dict[str, Any]) -> Message:
        given: Any = (
            arguments,
            json.dumps(arguments, ensure_ascii=False),
            json.dumps(arguments),
            json.dumps(arguments, indent=1, sort_keys=False),
        )[self.pick(4)]
        if not arguments:
            given = ({}, "{}", "", None)[self.pick(4)]
        function = {"name": name, "arguments": given}
        if given is None and self.pick(2):
            del function["arguments"]
        return ({"id": "1", "type": "function", "function": function}, function)[self.pick(2)]

    def tools(self) -> list[dict[str, Any]]:
        if not self.pick(2):
            return []
        return [
            {"type": "function", "function": {"name": name} | self._draw(self._object)}
            for name in self._draw(st.lists(self._said, min_size=1, max_size=2))
        ]

    def record(self, tools: list[dict[str, Any]]) -> dict[str, Any]:
        messages: Any = self.wild if self.pick(6) < 5 else json.dumps(self.wild)
        none: tuple[dict[str, Any], ...] = ({}, {"tools": None}, {"tools": []}, {"tools": ""})
        bare = [tool["function"] for tool in tools]
        some: tuple[dict[str, Any], ...] = (
            {"tools": tools},
            {"tools": json.dumps(tools, ensure_ascii=False)},
            {"tools": bare},
            {"functions": bare},
        )
        return {"id": None, "messages": messages} | (some if tools else none)[self.pick(4)]
