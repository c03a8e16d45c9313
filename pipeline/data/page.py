"""The data report and some rows as one page that needs nothing beside it: no network, no script."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import jinja2

from pipeline.data.rows import Row
from pipeline.data.show import Segment
from pipeline.data.words import (
    Bar,
    count_parts,
    describe_epoch,
    fit_line,
    list_found,
    list_histograms,
    list_noted,
    list_parts,
    list_sources,
    list_warnings,
    split_unprintable,
)

TEMPLATE = Path(__file__).with_name("page.html")

_WHOLE_PROMPT_CHARACTERS, _HEAD_CHARACTERS, _TAIL_CHARACTERS = 3000, 800, 1200


@dataclass(frozen=True)
class Chart:
    """One part's histogram, ready to be drawn."""

    title: str
    unit: str
    counted: str
    trained: bool
    """Whether it counts what is trained, and has its colour."""
    bars: list[Bar]
    edges: list[str] | None
    """Labels of the places between the bars; None where each bar has its own."""
    ticks: list[int]
    """Round numbers from zero to one that no bar exceeds."""


@dataclass(frozen=True)
class ShownRow:
    """A row with the middle of a long prompt apart, to be folded."""

    row: Row
    head: list[Segment]
    folded: list[Segment]
    tail: list[Segment]

    @property
    def folded_characters(self) -> int:
        """How much is folded."""
        return sum(len(segment.text) for segment in self.folded)


def render_page(
    title: str, report: dict[str, Any], shown: Sequence[tuple[Row, Sequence[Segment]]]
) -> str:
    """The page's HTML. Everything of the report's and the rows' is escaped: it may be hostile."""
    return _load_template().render(
        title=title,
        warnings=list_warnings(report),
        sources=list_sources(report),
        parts=list_parts(report),
        counts=count_parts(report),
        epoch=describe_epoch(report),
        charts=list(_charts(report)),
        noted=list_noted(report),
        found=list_found(report),
        shown=[_fold(row, segments) for row, segments in shown],
    )


@cache
def _load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["grouped"] = "{:,}".format
    environment.filters["shorten"] = _shorten
    environment.filters["split_unprintable"] = split_unprintable
    environment.filters["fit_line"] = fit_line
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _charts(report: dict[str, Any]) -> Iterator[Chart]:
    for histogram in list_histograms(report):
        for part, bars in histogram.parts.items():
            yield Chart(
                f"{histogram.title}, {part}",
                histogram.unit,
                histogram.counted,
                histogram.key == "supervised_tokens",
                bars,
                _label_edges(bars) if histogram.unit == "tokens" else None,
                _round_ticks(max(bar.count for bar in bars)),
            )


def _label_edges(bars: Sequence[Bar]) -> list[str]:
    """Powers of two, as short as the axis needs them: 32, 64, … 4k."""
    highs = [bar.high or 0 for bar in bars]
    lowest = max(bars[0].low - 1, 0)
    return [str(lowest)] + [f"{high // 1024}k" if high >= 1024 else str(high) for high in highs]


def _round_ticks(top: int) -> list[int]:
    """Steps of 1, 2 or 5 times a power of ten, five at most above zero."""
    steps = (factor * 10**power for power in count() for factor in (1, 2, 5))
    step = next(step for step in steps if step * 5 >= top)
    return list(range(0, top + step, step))


def _shorten(tick: int) -> str:
    """A round number as short as an axis needs it: 5,000, 20k, 1.5M."""
    if tick < 10_000:
        return f"{tick:,}"
    return f"{tick / 1000:g}k" if tick < 1_000_000 else f"{tick / 1_000_000:,g}M"


def _fold(row: Row, segments: Sequence[Segment]) -> ShownRow:
    prompt = [segment for segment in segments if not segment.trained]
    trained = [segment for segment in segments if segment.trained]
    size = sum(len(segment.text) for segment in prompt)
    if size <= _WHOLE_PROMPT_CHARACTERS:
        return ShownRow(row, [], [], [*prompt, *trained])
    head, rest = _split(prompt, _HEAD_CHARACTERS)
    kept = sum(len(segment.text) for segment in rest) - _TAIL_CHARACTERS
    folded, tail = _split(rest, kept)
    return ShownRow(row, head, folded, [*tail, *trained])


def _split(segments: Sequence[Segment], num_characters: int) -> tuple[list[Segment], list[Segment]]:
    """Cut after so many characters, or after the control token that is there."""
    before: list[Segment] = []
    for index, segment in enumerate(segments):
        if num_characters <= 0:
            return before, list(segments[index:])
        if len(segment.text) > num_characters and not segment.control:
            left, right = segment.text[:num_characters], segment.text[num_characters:]
            cut = [Segment(text, segment.trained, segment.control) for text in (left, right)]
            return [*before, cut[0]], [cut[1], *segments[index + 1 :]]
        before.append(segment)
        num_characters -= len(segment.text)
    return before, []
