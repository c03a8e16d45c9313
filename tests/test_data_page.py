"""The page: valid, self-contained, harmless whatever the data holds, and nothing left out."""

import copy
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_show import FIGURES, REPORT, THOUGHT, USER, make_row

from pipeline.data.page import TEMPLATE, _round_ticks, _shorten, render_page
from pipeline.data.rows import Row
from pipeline.data.show import Segment, segments
from pipeline.data.words import split_unprintable

VOID = {"meta", "br"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "small", "ul", "li"),
    *("table", "thead", "tbody", "tr", "td", "th", "br", "div", "figure", "figcaption", "svg"),
    *("text", "line", "rect", "section", "span", "strong", "details", "summary"),
}
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&amp;<!--]]></style></title></div>"


class Page(HTMLParser):
    """Walks a page, refusing what is not balanced; keeps tags, attributes and rows' text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        """Of each row, what is in it, folded or not."""
        self.chips: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], "never closed"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))
        if tag == "section":
            self.texts.append("")

    def handle_startendtag(self, tag, attrs):
        assert "svg" in [name for name, _ in self.open], "only SVG knows the slash"
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        name, _ = self.open.pop()
        assert tag == name

    def handle_data(self, data):
        self.said.append(data)
        if ("div", "text") in self.open:
            self.texts[-1] += data
            kind = self.open[-1][1]
            if kind.endswith("control"):
                self.chips.append((kind, data))


def visible(text: str) -> str:
    return "".join(piece for piece, _ in split_unprintable(text))


def test_the_page_says_everything_the_terminal_says(chat):
    row = make_row(chat, USER, THOUGHT)

    page = Page(render_page("support", REPORT, [(row, segments(row, chat))]))

    said = " ".join("".join(page.said).split())
    expected = [figure for figure in FIGURES if figure != "4,097–8,192"]
    expected += ["4,097–8,192 tokens: 3,678 rows", "10+ assistant turns: 34,000 conversations"]
    assert [figure for figure in expected if figure not in said] == []
    assert all(warning in said for warning in REPORT["warnings"])
    assert f"a.jsonl:1 message 1 thinking {len(row.prompt_ids)} prompt tokens" in said


def test_the_page_needs_nothing_beside_it_and_loads_nothing(chat):
    row = make_row(chat, USER, THOUGHT)

    html = render_page("support", REPORT, [(row, segments(row, chat))])

    page = Page(html)
    assert page.tags <= ALLOWED
    assert not page.attributes & {"src", "href", "srcset", "style", "data", "action", "xlink:href"}
    assert not [name for name in page.attributes if name.startswith("on")]
    assert not re.search(r"<link|@import|url\(|://", html)
    assert "default-src 'none'; style-src 'unsafe-inline'" in html
    assert html.startswith("<!DOCTYPE html>")
    assert TEMPLATE.is_file()


def test_hostile_text_stays_text_wherever_it_stands(chat):
    report = copy.deepcopy(REPORT)
    report["sources"][0]["name"] = HOSTILE
    report["sources"][0]["format"] = HOSTILE
    report["warnings"] = [HOSTILE]
    report["noted"] = {HOSTILE: 1, "invalid": 1}
    report["examples"] = {"invalid": [HOSTILE]}
    report["overlap"]["examples"] = [[HOSTILE, HOSTILE]]
    report["secrets"] = {HOSTILE: {"count": 1, "examples": [HOSTILE]}}
    row = make_row(chat, {"role": "user", "content": HOSTILE}, {**THOUGHT, "content": HOSTILE})

    page = Page(render_page(HOSTILE, report, [(row, segments(row, chat))]))

    assert page.tags <= ALLOWED
    assert "onerror" not in page.attributes
    assert "".join(page.said).count(HOSTILE) == 13


texts = st.text(min_size=1) | st.sampled_from(
    [HOSTILE, "\n\n  a\t b \n", "{{ 7 * 7 }}", "\x1b[0m\r\n"]
)


@settings(max_examples=40)
@given(question=texts, answer=texts)
def test_a_rows_text_is_on_the_page_to_the_last_blank(chat, question, answer):
    row = make_row(chat, {"role": "user", "content": question}, {**THOUGHT, "content": answer})

    page = Page(render_page("support", {}, [(row, segments(row, chat))]))

    assert page.texts == [visible(chat.decode(row.prompt_ids + row.completion_ids))]


def test_control_tokens_are_chips_and_the_trained_ones_have_the_accent(chat):
    row = make_row(chat, USER, THOUGHT)

    page = Page(render_page("support", {}, [(row, segments(row, chat))]))

    assert page.chips == [
        ("prompt control", "<|im_start|>"),
        ("prompt control", "<|im_end|>"),
        ("prompt control", "<|im_start|>"),
        ("trained control", "<think>"),
        ("trained control", "</think>"),
        ("trained control", "<|im_end|>"),
    ]


@pytest.mark.parametrize("size", [2700, 3001, 20_000])
def test_a_long_prompt_is_folded_in_the_middle_and_what_is_trained_never(chat, size):
    system = {"role": "system", "content": "Know this. " * (size // 11)}
    long_answer = {**THOUGHT, "content": "Whole. " * 2000}
    row = make_row(chat, system, USER, long_answer)

    html = render_page("support", {}, [(row, segments(row, chat))])

    assert Page(html).texts == [chat.decode(row.prompt_ids + row.completion_ids)]
    if size < 3000:
        assert "<details>" not in html
        return
    before, _, rest = html.partition("<details>")
    folded, _, after = rest.partition("</details>")
    number = len(chat.decode(row.prompt_ids)) - 2000
    assert f"… {number:,} characters of the prompt …" in folded
    assert "Know this." in before.partition("</style>")[2]
    assert "Say &lt;|im_end|&gt; and" in after
    assert "Whole." not in before + folded


def test_a_fold_leaves_control_tokens_whole():
    row_segments = [Segment("<|im_start|>", False, True)] * 400 + [Segment("a", True, False)]
    row = Row([257] * 400, [97], "a.jsonl:1", 1, "direct")

    html = render_page("support", {}, [(row, row_segments)])

    assert {text for _, text in Page(html).chips} == {"<|im_start|>"}
    assert len(Page(html).chips) == 400


def test_a_report_without_anything_is_still_a_page():
    page = Page(render_page("support", {}, []))

    assert not page.tags & {"h2", "table", "svg", "section"}


def test_bars_stand_to_each_other_as_their_counts_and_the_axes_are_labelled():
    prompts = {"1": 1, "4": 5_000, "2048": 25_000}
    report = {"histograms": {"train": {"prompt_tokens": prompts, "turns": {"2": 4, "3": 1}}}}

    tokens, turns = re.findall(r"<svg.*?</svg>", render_page("support", report, []), re.S)

    heights = [float(height) for height in re.findall(r'<rect.*? height="(.*?)"', tokens)]
    assert heights[0] == 1, "one row among thousands can still be seen"
    assert heights[2] == heights[-1] / 5 == 25
    assert heights.count(0) == 9
    assert re.findall(r"<text.*?>(.*?)</text>", tokens) == [
        *("rows", "0", "5,000", "10k", "15k", "20k", "25k"),
        *("0", "1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1k", "2k", "tokens"),
    ]
    labels = re.findall(r"<text.*?>(.*?)</text>", turns)
    assert labels == ["conversations", "0", "1", "2", "3", "4", "2", "3", "assistant turns"]
    assert [_shorten(tick) for tick in (10_000, 1_500_000, 2 * 10**9)] == ["10k", "1.5M", "2,000M"]


@given(st.integers(1, 10**12))
def test_ticks_are_few_and_reach_just_over_the_highest_bar(top):
    ticks = _round_ticks(top)

    assert ticks[0] == 0
    assert ticks[-2] < top <= ticks[-1]
    assert 2 <= len(ticks) <= 6
