"""What the terminal shows: rows whole and harmless, the report's figures at any width."""

import copy
from io import StringIO
from itertools import pairwise
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from rich.text import Text

from pipeline.chat import Chat
from pipeline.data.notes import Note
from pipeline.data.rows import Row
from pipeline.data.show import (
    PROMPT_CONTROL_STYLE,
    PROMPT_STYLE,
    TRAINED_CONTROL_STYLE,
    TRAINED_STYLE,
    report_tables,
    row_text,
    segments,
)
from pipeline.data.words import (
    MEANING,
    PARTS,
    list_found,
    list_histograms,
    list_noted,
    split_unprintable,
)

REPORT: dict[str, Any] = {
    "sources": [
        {
            "name": "data/[bold]a-long-folder-name[/bold]/exported-chats-of-2024/*.jsonl.zst",
            "format": "messages",
            "files": 12,
            "conversations": 1234567,
            "weight": 0.5,
            "part": "train",
        },
        {
            "name": "held.jsonl",
            "format": "sharegpt",
            "files": 1,
            "conversations": 120,
            "weight": 1.0,
            "part": "eval",
        },
    ],
    "train": {
        "conversations": 1234000,
        "rows": 2345678,
        "thinking_rows": 1200000,
        "direct_rows": 1145678,
        "text_rows": 0,
        "prompt_tokens": 1234567890,
        "supervised_tokens": 234567890,
        "longest_row": 4096,
        "tool_calls": 57,
    },
    "eval": {"conversations": 120, "rows": 131, "direct_rows": 131, "prompt_tokens": 9120},
    "histograms": {
        "train": {
            "prompt_tokens": {"32": 12000, "64": 1340000, "8192": 3678},
            "supervised_tokens": {"16": 2345678},
            "row_tokens": {"64": 2345678},
            "turns": {"1": 900000, "2": 300000, "14": 34000},
        },
        "eval": {"prompt_tokens": {"64": 131}, "turns": {"1": 119, "2": 1}},
    },
    "noted": {"invalid": 2, "overlong": 1357, "a_new_count": 4},
    "examples": {"invalid": ["chats.jsonl:7: message 1: content must be text, not int"]},
    "duplicates": {"exact": 31, "near": 17, "examples": [["a.jsonl:1", "a.jsonl:9"]]},
    "overlap": {"exact": 1, "near": 0, "examples": [["train.jsonl:4", "eval.jsonl:9"]]},
    "secrets": {"e-mail address": {"count": 23, "examples": ["a.jsonl:33"]}},
    "epoch": {"row_tokens": 3000000, "shared_tokens": 1200000},
    "warnings": ["1 held-out conversation is also trained on.", "23 e-mail addresses are trained."],
}
FIGURES = [
    *("1,234,567", "12 files", "weight 0.5", "2,345,678", "1,145,678", "1,234,567,890", "4,096"),
    *(
        "9,120",
        "4,097–8,192",
        "1,340,000",
        "10+",
        "34,000",
        "1,357",
        "chats.jsonl:7",
        "a new count",
    ),
    *("31", "17", "a.jsonl:1 and a.jsonl:9", "train.jsonl:4", "e-mail address", "a.jsonl:33"),
    *("3,000,000", "1,200,000", "2.50", "23 e-mail addresses are trained."),
]
USER = {"role": "user", "content": "Say <|im_end|> and 漢字 👩‍👩‍👧."}
THOUGHT = {"role": "assistant", "content": "漢字 👍🏽", "reasoning": "Fine."}


def make_row(chat: Chat, *messages: dict[str, Any]) -> Row:
    *_, turn = chat.turns(messages, None)
    return Row(turn.prompt_ids, turn.completion_ids, "a.jsonl:1", turn.index, turn.mode)


def render(*parts: RenderableType, width: int = 80, **how: Any) -> str:
    file = StringIO()
    console = Console(width=width, file=file, **how)
    for part in parts:
        console.print(part)
    return file.getvalue()


def style_of(text: Text, part: str) -> str:
    """The style of the first place where a text says something."""
    place = text.plain.index(part)
    (style,) = [span.style for span in text.spans if span.start <= place < span.end]
    return str(style)


texts = st.text(min_size=1) | st.sampled_from(
    ["<|im_end|>", "a</think>b", "👩‍👩‍👧\r\n", "é漢 字\n"]
)


@given(system=texts, question=texts, answer=texts, reasoning=texts)
def test_segments_join_to_the_row_and_the_trained_ones_are_the_completion(
    chat, system, question, answer, reasoning
):
    row = make_row(
        chat,
        {"role": "system", "content": system},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, "reasoning": reasoning},
    )

    found = segments(row, chat)

    ids = row.prompt_ids + row.completion_ids
    assert "".join(s.text for s in found) == chat.decode(ids)
    assert "".join(s.text for s in found if s.trained) == chat.decode(row.completion_ids)
    assert [s.text for s in found if s.control] == [
        chat.decode([token_id]) for token_id in ids if token_id in chat.control_ids
    ]
    plain = [(a, b) for a, b in pairwise(found) if not a.control | b.control]
    assert all(a.trained != b.trained for a, b in plain), "two segments that are one run"


def test_a_users_literal_control_token_is_ordinary_text(chat):
    found = segments(make_row(chat, USER, THOUGHT), chat)

    assert "user\nSay <|im_end|> and 漢字 👩‍👩‍👧." in [s.text for s in found if not s.control]


def test_control_tokens_side_by_side_are_a_segment_each(chat):
    call = {"function": {"name": "look", "arguments": {"at": "it"}}}
    row = make_row(chat, USER, {"role": "assistant", "content": "", "tool_calls": [call]})

    assert [s.text for s in segments(row, chat)][-2:] == ["</tool_call>", "<|im_end|>"]


def test_prompt_trained_tokens_and_the_control_tokens_of_each_look_different(chat):
    text = row_text(make_row(chat, USER, THOUGHT), chat)

    assert style_of(text, "Say") == PROMPT_STYLE
    assert style_of(text, "<|im_start|>") == PROMPT_CONTROL_STYLE
    assert style_of(text, "Fine.") == TRAINED_STYLE
    assert style_of(text, "<think>") == TRAINED_CONTROL_STYLE
    assert len({PROMPT_STYLE, PROMPT_CONTROL_STYLE, TRAINED_STYLE, TRAINED_CONTROL_STYLE}) == 4
    without_colour = render(text, force_terminal=True, no_color=True)
    assert "\x1b[1mFine.\x1b[0m" in without_colour
    assert "\x1b[2mSay" in without_colour


def test_a_row_says_where_it_is_from_and_how_long_it_is(chat):
    row = make_row(chat, USER, THOUGHT)

    header = row_text(row, chat).plain.removeprefix("\n").partition("\n")[0]

    assert header.split("  ") == [
        "a.jsonl:1",
        "message 1",
        "thinking",
        f"{len(row.prompt_ids)} prompt + {len(row.completion_ids)} trained tokens",
    ]


def test_a_row_of_plain_text_is_all_trained_and_has_no_message(chat):
    row = Row([], chat.encode("Once upon a time"), "a.txt:1", 0, "text")

    header, _, body = row_text(row, chat).plain.removeprefix("\n").partition("\n")

    assert header == "a.txt:1  text  0 prompt + 16 trained tokens"
    assert body == "Once upon a time"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\r\n", r"a\rb\r"),
        ("\u202eabc\u202c\u2066", r"\u202eabc\u202c\u2066"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("\x9b31m\x00\x7f\x08", r"\x9b31m\x00\x7f\x08"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_would_act_on_the_terminal_is_shown_escaped(chat, raw, shown):
    question = {"role": "user", "content": f"({raw})"}
    row = make_row(chat, question, {"role": "assistant", "content": f"[{raw}]"})

    printed = render(row_text(row, chat))

    assert printed.count(shown) == 2, "prompt and answer"
    assert not set(raw) & set(printed) & set("\x1b\x07\r\u202e\u202c\u2066\u200b\ufeff\x9b\0\x7f\b")


@given(st.text(st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Cs", "Lu"])))
def test_only_the_unprintable_is_escaped_and_nothing_is_lost(text):
    pieces = list(split_unprintable(text))

    assert all(piece.isprintable() for piece, escaped in pieces if escaped)
    raw = "".join(piece for piece, escaped in pieces if not escaped)
    assert not any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 for c in raw)
    back = [p.encode("ascii").decode("unicode_escape") if e else p for p, e in pieces]
    assert "".join(back) == text


@pytest.mark.parametrize("shift", range(4))
def test_only_the_middle_of_a_long_prompt_is_folded_and_never_within_a_character(chat, shift):
    question = {"role": "user", "content": "x" * shift + "👍" * 2000 + "The end?"}
    answer = {"role": "assistant", "content": "Whole: " + "漢字 " * 2000 + "done."}
    row = make_row(chat, question, answer)

    text = row_text(row, chat)
    shown = text.plain
    prompt = shown[: shown.index("Whole: ")]
    head, fold, tail = prompt.removeprefix("\n").partition("\n")[2].rpartition("tokens …\n")

    head, _, number = head.rpartition("\n… ")
    assert fold
    assert "\ufffd" not in shown
    assert head.startswith("<|im_start|>user")
    assert "The end?" in tail
    kept = len(chat.encode(head)) + len(chat.encode(tail))
    assert kept + int(number.replace(",", "")) == len(row.prompt_ids)
    assert 400 <= kept <= 600
    assert style_of(text, "The end?") == PROMPT_STYLE
    assert style_of(text, "Whole: ") == TRAINED_STYLE
    assert chat.decode(row.completion_ids) in shown


def test_a_prompt_of_usual_length_is_shown_whole(chat):
    row = make_row(chat, {"role": "user", "content": "x" * 700}, THOUGHT)

    assert chat.decode(row.prompt_ids + row.completion_ids) in row_text(row, chat).plain


@pytest.mark.parametrize("width", [80, 60])
def test_the_report_has_every_figure_and_fits_the_terminal(width):
    printed = render(*report_tables(REPORT), width=width)

    assert max(map(len, printed.splitlines())) <= width
    joined = " ".join(printed.split())
    assert [figure for figure in FIGURES if figure not in joined] == []
    assert "[bold]a-long-folder-name[/bold]" in printed, "a file name is not markup"
    assert "…" not in printed.replace("\n…", ""), "a cell was cut"


def test_what_was_noted_is_said_in_words_and_places_stand_after_what_they_are_examples_of():
    noted = list_noted({"noted": dict.fromkeys([*reversed(MEANING), "a_new_count"], 3)})
    exact, near, *_ = list_found(REPORT)

    assert set(MEANING) == set(get_args(Note))
    assert [finding.what for finding in noted] == [*MEANING.values(), "a new count"]
    assert (exact.places, near.places) == ((), ("a.jsonl:1 and a.jsonl:9",))


def test_warnings_come_last_and_in_yellow():
    *_, last = report_tables(REPORT)

    assert isinstance(last, Text)
    assert str(last.style) == "yellow"
    assert last.plain.split("\nwarning: ")[1:] == REPORT["warnings"]


@pytest.mark.parametrize(
    ("section", "title"),
    [
        ("sources", "Conversations by source"),
        ("histograms", "Rows by"),
        ("noted", "Dropped or noted"),
        ("epoch", "Cost of an epoch"),
        ("warnings", "warning"),
    ],
)
@pytest.mark.parametrize("how", ["empty", "missing"])
def test_a_section_without_anything_is_left_out(section, title, how):
    report = copy.deepcopy(REPORT)
    assert title in render(*report_tables(report))
    if how == "missing":
        del report[section]
    else:
        report[section] = type(report[section])()

    assert title not in render(*report_tables(report))


def test_zeros_are_left_out():
    report = copy.deepcopy(REPORT)
    report |= {"duplicates": {"exact": 0, "near": 0, "examples": []}, "secrets": {}, "noted": {}}
    report["overlap"]["exact"] = 0
    report["noted"] = {"invalid": 0}
    report["eval"] = dict.fromkeys(report["eval"], 0)
    report["histograms"]["eval"] = {}
    report["warnings"] = []

    printed = render(*report_tables(report))

    for absent in ("uplicates", "secrets", "noted", "plain text", "conversations dropped"):
        assert absent not in printed
    assert printed.count("held-out") == 1, "only the held-out source is left"
    assert report_tables({}) == []


def test_the_reports_strings_cannot_act_on_the_terminal():
    report = copy.deepcopy(REPORT)
    report["sources"][0]["name"] = "\x1b[2Ja\nb"
    report["warnings"] = ["\x1b]0;x\x07 \u202e\udc80"]
    report["secrets"] = {"\x1bkey": {"count": 1, "examples": ["\x1b.jsonl:1"]}}

    printed = render(*report_tables(report))

    assert "\x1b" not in printed
    assert "\u202e" not in printed
    for shown in (r"\x1b[2Ja b", r"\x1b]0;x\x07 \u202e\udc80", r"\x1bkey", r"\x1b.jsonl:1"):
        assert shown in printed


def test_bars_in_the_terminal_are_as_long_as_their_counts_and_absent_for_none():
    counts = {"1": 1, "4": 500_000, "8": 1_000_000}

    printed = render(*report_tables({"histograms": {"train": {"row_tokens": counts}}}))

    assert [line.strip() for line in printed.splitlines()[3:]] == [
        "0–1  ▏                  1",
        "2                     0",
        "3–4  █████        500,000",
        "5–8  ██████████ 1,000,000",
    ]


powers = st.dictionaries(st.integers(0, 18).map(lambda k: str(2**k)), st.integers(0, 10**9))
turns = st.dictionaries(st.integers(0, 30).map(str), st.integers(0, 10**9))


@given(train=powers, held=powers, turns=turns)
def test_a_histogram_has_a_bar_for_every_count_and_no_gap(train, held, turns):
    report = {
        "histograms": {
            "train": {"prompt_tokens": train, "turns": turns},
            "eval": {"prompt_tokens": held},
        }
    }

    found = {histogram.key: histogram.parts for histogram in list_histograms(report)}

    given_counts = {("prompt_tokens", "train"): train, ("prompt_tokens", "eval"): held}
    given_counts["turns", "train"] = turns
    for (key, part), counts in given_counts.items():
        if not any(counts.values()):
            assert PARTS[part] not in found.get(key, {})
            continue
        bars = found[key][PARTS[part]]
        assert sum(bar.count for bar in bars) == sum(counts.values())
        assert all(a.high + 1 == b.low for a, b in pairwise(bars))
        for value, count in counts.items():
            if count and (key != "turns" or int(value) < 10):
                (bar,) = [bar for bar in bars if bar.high == int(value)]
                assert bar.count == count
