"""The data report and single rows, for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.table import Table
from rich.text import Text

from pipeline.chat import Chat
from pipeline.data.rows import Row
from pipeline.data.words import (
    Finding,
    Histogram,
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

PROMPT_STYLE, PROMPT_CONTROL_STYLE = "dim", "dim reverse"
# Bold, so that a terminal told to use no colour still tells it from the prompt.
TRAINED_STYLE, TRAINED_CONTROL_STYLE = "bold green", "bold green reverse"

_WHOLE_PROMPT_TOKENS, _HEAD_TOKENS, _TAIL_TOKENS = 800, 200, 300
_LONGEST_CHARACTER = 4
"""Bytes, and so tokens at most."""
_BAR_CELLS = 10
_EIGHTHS = " ▏▎▍▌▋▊▉"
_SHOWN_PLACES = 3


@dataclass(frozen=True)
class Segment:
    """A run of a row's text whose ids are all trained or not, all control tokens or not."""

    text: str
    trained: bool
    control: bool
    """One control token. Known by its id: a user's literal `<|im_end|>` is ordinary text."""


def segments(row: Row, chat: Chat) -> list[Segment]:
    """A row cut where training begins and around each control token; the texts join to the row."""
    return [
        *_segment(row.prompt_ids, chat, trained=False),
        *_segment(row.completion_ids, chat, trained=True),
    ]


def row_text(row: Row, chat: Chat) -> Text:
    """A row with its prompt dim, what is trained coloured and control tokens visible.

    The middle of a long prompt is left out; what is trained is whole. Characters of the user's text
    that would act on the terminal are escaped.
    """
    num_prompt, num_trained = len(row.prompt_ids), len(row.completion_ids)
    turn = f"message {row.turn}  " if row.turn else ""  # a text and a pair's reply have none
    text = Text("\n")
    text.append(f"{fit_line(row.source)}  {turn}{row.mode}  ", style="bold")
    text.append(f"{num_prompt:,} prompt", style=PROMPT_STYLE)
    text.append(" + ")
    text.append(f"{num_trained:,} trained", style=TRAINED_STYLE)
    text.append(" tokens\n")
    if num_prompt <= _WHOLE_PROMPT_TOKENS:
        _append(text, segments(row, chat))
        return text
    head = _whole_characters(row.prompt_ids, _HEAD_TOKENS, chat)
    tail = _whole_characters(row.prompt_ids, num_prompt - _TAIL_TOKENS, chat)
    _append(text, _segment(row.prompt_ids[:head], chat, trained=False))
    text.append(f"\n… {tail - head:,} tokens …\n", style="italic")
    _append(text, _segment(row.prompt_ids[tail:], chat, trained=False))
    _append(text, _segment(row.completion_ids, chat, trained=True))
    return text


def report_tables(report: dict[str, Any]) -> list[Table | Text]:
    """What the data stage tells when it is done, in the order to print it; warnings come last."""
    shown: list[Table | Text] = []
    if sources := list_sources(report):
        shown.append(_finding_table("Conversations by source", sources))
    if parts := list_parts(report):
        shown.append(_part_table(parts, count_parts(report)))
    shown += [_histogram_table(histogram) for histogram in list_histograms(report)]
    if noted := list_noted(report):
        shown.append(_finding_table("Dropped or noted", noted))
    if found := list_found(report):
        shown.append(_finding_table("Duplicates, overlap and secrets", found))
    if epoch := describe_epoch(report):
        shown.append(Text.assemble(("\nCost of an epoch\n", "bold"), f"  {epoch}"))
    if warnings := list_warnings(report):
        shown.append(Text("".join(f"\nwarning: {warning}" for warning in warnings), "yellow"))
    return shown


def _segment(ids: Sequence[int], chat: Chat, trained: bool) -> list[Segment]:
    found = []
    for control, run in groupby(ids, chat.control_ids.__contains__):
        # A run is decoded in one piece, for the bytes of one character may be several tokens.
        run_ids = list(run)
        pieces = [[token_id] for token_id in run_ids] if control else [run_ids]
        found += [Segment(chat.decode(piece), trained, control) for piece in pieces]
    return found


def _append(text: Text, pieces: Sequence[Segment]) -> None:
    for segment in pieces:
        if segment.control:
            style = TRAINED_CONTROL_STYLE if segment.trained else PROMPT_CONTROL_STYLE
        else:
            style = TRAINED_STYLE if segment.trained else PROMPT_STYLE
        for piece, escaped in split_unprintable(segment.text):
            text.append(piece, style=f"{style} underline" if escaped else style)


def _whole_characters(ids: Sequence[int], place: int, chat: Chat) -> int:
    """The first place from `place` on where a cut does not go through a character."""
    for later in range(place, min(place + _LONGEST_CHARACTER, len(ids))):
        around = ids[max(0, later - _LONGEST_CHARACTER) : later + _LONGEST_CHARACTER]
        first = min(later, _LONGEST_CHARACTER)
        if chat.decode(around) == chat.decode(around[:first]) + chat.decode(around[first:]):
            return later
    return place


def _table(title: str) -> Table:
    return Table(
        title=Text(f"\n{title}", "bold"),
        title_justify="left",
        box=None,
        padding=(0, 0, 0, 2),
        header_style="dim",
    )


def _part_table(parts: Sequence[str], counted: Sequence[tuple[str, list[int]]]) -> Table:
    table = _table("Rows")
    table.add_column()
    for part in parts:
        table.add_column(part, justify="right")
    for what, counts in counted:
        table.add_row(what, *(f"{count:,}" for count in counts))
    return table


def _histogram_table(histogram: Histogram) -> Table:
    table = _table(histogram.title)
    table.add_column(histogram.unit, justify="right")
    columns = []
    for part, bars in histogram.parts.items():
        table.add_column(part)
        top = max(bar.count for bar in bars)
        width = len(f"{top:,}")
        columns.append([f"{_draw_bar(bar.count / top)} {bar.count:{width},}" for bar in bars])
    labels = [bar.label for bar in next(iter(histogram.parts.values()))]
    for cells in zip(labels, *columns, strict=True):
        table.add_row(*cells)
    return table


def _draw_bar(share: float) -> str:
    """A bar of text; whatever is not nothing can be seen."""
    eighths = max(round(share * _BAR_CELLS * 8), 1 if share else 0)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).strip().ljust(_BAR_CELLS)


def _finding_table(title: str, findings: Sequence[Finding]) -> Table:
    table = _table(title)
    table.show_header = False
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        what = Text(finding.what)
        for place in finding.places[:_SHOWN_PLACES]:
            what.append(f"\n{place}", "dim")
        if len(finding.places) > _SHOWN_PLACES:
            what.append("\n…", "dim")
        table.add_row(f"{finding.count:,}", what)
    return table
