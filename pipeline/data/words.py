"""What the data report says, in plain words: the terminal and the page show the same."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.data.batches import STEP_ROWS

PARTS = {"train": "train", "eval": "held-out"}
"""The report's parts, and what they are called."""

MEANING = {
    "invalid": "conversations dropped: they cannot become rows (data.invalid=drop)",
    "overlong": "rows dropped: longer than data.max_tokens",
    "history_split": "rows whose oldest turns were left out of the prompt, to fit data.max_tokens",
    "without_reasoning": "turns left out: they have no reasoning (data.thinking=always)",
    "context_only": "assistant turns that are context, never trained: they come before any user "
    'turn, or are marked "train": false or "weight": 0',
    "unanswered": "conversations that end in a user or tool turn: their end is not trained",
    "names": "messages with a name, which the template has no place for: it is left out",
    "stray_tags": "answers with a literal think or tool_call tag, kept as ordinary text",
    "switched_think": "questions that got the soft switch /think",
    "switched_no_think": "questions that got the soft switch /no_think",
    "texts_cut": "texts longer than data.max_tokens, cut into several rows",
}
"""What each count under the report's `noted` means; the count stands before it."""

_PART_COUNTS = {
    "conversations": "conversations",
    "rows": "rows",
    "thinking_rows": "rows in thinking mode",
    "direct_rows": "rows in direct mode",
    "text_rows": "rows of plain text",
    "pairs": "preference pairs",
    "prompt_tokens": "prompt tokens",
    "supervised_tokens": "supervised tokens",
    "longest_row": "longest row, tokens",
    "pair_tokens": "tokens of pairs, each reply with its prompt",
    "shared_pair_tokens": "tokens of pairs whose replies share their prompt",
    "supervised_pair_tokens": "tokens of pairs' replies",
    "longest_pair": "longest of such pairs, tokens",
    "rows_with_tools": "rows with tools",
    "tool_calls": "tool calls",
}
_HISTOGRAMS = {
    "prompt_tokens": "Rows by prompt tokens",
    "supervised_tokens": "Rows by supervised tokens",
    "row_tokens": "Rows by all their tokens",
}
_REPEATS = {
    "duplicates": {"exact": "exact duplicates", "near": "near duplicates"},
    "overlap": {
        "exact": "held-out conversations that are also trained on",
        "near": "held-out conversations nearly like one that is trained on",
    },
}
_MOST_TURNS = 10
# Would move the cursor, reorder the line or hide in it: control characters but tab and line break,
# Unicode's own line breaks, its direction controls, its invisible ones, and halves of a character.
_UNPRINTABLE = re.compile(
    "([\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufeff\U000e0000-\U000e007f])"
)


@dataclass(frozen=True)
class Bar:
    """How many have a value from low to high; high is None for no limit."""

    low: int
    high: int | None
    count: int

    @property
    def label(self) -> str:
        """`33–64`, `1`, `10+`."""
        if self.high is None:
            return f"{self.low:,}+"
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,}–{self.high:,}"


@dataclass(frozen=True)
class Histogram:
    """One measure of each part; all parts have the same bars."""

    key: str
    title: str
    unit: str
    """What the values are: tokens."""
    counted: str
    """What has them: rows."""
    parts: dict[str, list[Bar]]
    """By the part's name."""


@dataclass(frozen=True)
class Finding:
    """So many of something, and places where it is."""

    count: int
    what: str
    places: tuple[str, ...]


def split_unprintable(text: str) -> Iterator[tuple[str, bool]]:
    """A text in pieces; a True one stands for a character that may not be shown raw: `\\x1b`."""
    for index, piece in enumerate(_UNPRINTABLE.split(text)):
        if index % 2:
            yield piece.encode("unicode_escape").decode("ascii"), True
        elif piece:
            yield piece, False


def fit_line(text: str) -> str:
    """A text of the report on one line, with nothing in it that may not be shown raw."""
    return "".join(piece for piece, _ in split_unprintable(" ".join(text.split())))


def list_sources(report: Mapping[str, Any]) -> list[Finding]:
    """Conversations of each source, its name, and in place of places what is to be said of it."""
    return [
        Finding(source["conversations"], fit_line(source["name"]), (_describe_source(source),))
        for source in report.get("sources") or ()
    ]


def list_parts(report: Mapping[str, Any]) -> list[str]:
    """The names of the parts that have anything in them."""
    return [name for part, name in PARTS.items() if any((report.get(part) or {}).values())]


def count_parts(report: Mapping[str, Any]) -> list[tuple[str, list[int]]]:
    """What was counted, and how many in each of `list_parts`; zeros throughout are left out."""
    parts = [report[part] for part, name in PARTS.items() if name in list_parts(report)]
    counted = [(what, [p.get(key, 0) for p in parts]) for key, what in _PART_COUNTS.items()]
    return [(what, counts) for what, counts in counted if any(counts)]


def list_histograms(report: Mapping[str, Any]) -> list[Histogram]:
    """Tokens a row, then turns a conversation; those without any value are left out."""
    found = []
    for key, title in _HISTOGRAMS.items():
        counts = _collect(report, key)
        found.append(Histogram(key, title, "tokens", "rows", _token_bars(counts)))
    counts = _collect(report, "turns")
    title = "Conversations by assistant turns"
    found.append(Histogram("turns", title, "assistant turns", "conversations", _turn_bars(counts)))
    return [histogram for histogram in found if histogram.parts]


def list_noted(report: Mapping[str, Any]) -> list[Finding]:
    """What was dropped, left out or changed, and why."""
    noted, examples = report.get("noted") or {}, report.get("examples") or {}
    keys = [
        *(key for key in MEANING if key in noted),
        *(key for key in noted if key not in MEANING),
    ]
    return [
        Finding(
            noted[key],
            MEANING.get(key) or fit_line(key.replace("_", " ")),
            tuple(map(fit_line, examples.get(key, ()))),
        )
        for key in keys
        if noted[key]
    ]


def list_found(report: Mapping[str, Any]) -> list[Finding]:
    """Duplicates, overlap of training and held-out part, suspected secrets."""
    found = []
    for key, kinds in _REPEATS.items():
        repeats = report.get(key) or {}
        places = tuple(" and ".join(map(fit_line, pair)) for pair in repeats.get("examples", ()))
        present = [kind for kind in kinds if repeats.get(kind)]
        # The report does not say which of the kinds a pair is of: they stand after the last one.
        for kind in present:
            shown = places if kind == present[-1] else ()
            found.append(Finding(repeats[kind], kinds[kind], shown))
    for name, secret in (report.get("secrets") or {}).items():
        places = tuple(map(fit_line, secret.get("examples", ())))
        found.append(Finding(secret["count"], f"suspected secrets: {fit_line(name)}", places))
    return [finding for finding in found if finding.count]


def describe_epoch(report: Mapping[str, Any]) -> str:
    """The cost of an epoch in one sentence; empty if it is not known."""
    epoch = report.get("epoch") or {}
    flat, shared = epoch.get("row_tokens", 0), epoch.get("shared_tokens", 0)
    if not flat or not shared:
        return ""
    return (
        f"{flat:,} tokens row by row; predicted {shared:,} where {STEP_ROWS} neighbouring rows "
        f"compute once what they share (a ratio of {flat / shared:.2f})."
    )


def list_warnings(report: Mapping[str, Any]) -> list[str]:
    """One sentence each."""
    return [fit_line(warning) for warning in report.get("warnings") or ()]


def _describe_source(source: Mapping[str, Any]) -> str:
    said = [fit_line(source["format"]), PARTS[source["part"]]]
    if source["files"] != 1:
        said.append(f"{source['files']:,} files")
    if source["weight"] != 1:
        said.append(f"weight {source['weight']:.3g}")
    return ", ".join(said)


def _collect(report: Mapping[str, Any], key: str) -> dict[str, dict[int, int]]:
    """A histogram's counts by value, by the name of each part that has any."""
    parts = {
        name: (report.get("histograms") or {}).get(part, {}).get(key) or {}
        for part, name in PARTS.items()
    }
    return {
        name: {int(value): count for value, count in counts.items()}
        for name, counts in parts.items()
        if any(counts.values())
    }


def _token_bars(parts: Mapping[str, Mapping[int, int]]) -> dict[str, list[Bar]]:
    """Bars from each power of two to the next, without a gap, over what the parts hold together."""
    bounds = [bound for counts in parts.values() for bound, count in counts.items() if count]
    if not bounds:
        return {}
    powers = [2**k for k in range(max(bounds).bit_length())]
    highs = [high for high in powers if high >= min(bounds)]
    return {
        name: [Bar(high // 2 + 1 if high > 1 else 0, high, counts.get(high, 0)) for high in highs]
        for name, counts in parts.items()
    }


def _turn_bars(parts: Mapping[str, Mapping[int, int]]) -> dict[str, list[Bar]]:
    """A bar for each number of turns; what lies beyond a screenful is one bar."""
    values = [value for counts in parts.values() for value, count in counts.items() if count]
    if not values:
        return {}
    bars = {}
    for name, counts in parts.items():
        last = min(max(values), _MOST_TURNS)
        bars[name] = [Bar(n, n, counts.get(n, 0)) for n in range(min(*values, last), last)]
        beyond = sum(count for value, count in counts.items() if value >= last)
        bars[name].append(Bar(last, last if max(values) == last else None, beyond))
    return bars
