"""What the server's users have used."""

from typing import TYPE_CHECKING, Annotated

import typer
from typer import echo as say

from pipeline.cli.keys import Books
from pipeline.cli.printable import printable

if TYPE_CHECKING:
    from pipeline.serve.books.report import Line

_GROUP_WIDTH = 40
_ANY_WIDTH = 10_000
commands = typer.Typer(invoke_without_command=True)


@commands.callback()
def usage(
    context: typer.Context,
    by: Annotated[
        str,
        typer.Option(metavar="WORDS", help="Of model, key, day, provider, app and user."),
    ] = "model",
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="The first day that counts, by UTC.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="DATE", help="The last day that counts.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="For programs: exact, with commas.")] = False,
    books: Books = None,
) -> None:
    """Sum up what was asked and answered, also while a server runs."""
    if context.invoked_subcommand:
        return
    from pipeline.errors import BooksError
    from pipeline.serve.books.database import open_books
    from pipeline.serve.books.report import parse_by, parse_day, read_report
    from pipeline.serve.books.sums import Scope

    words = parse_by(by)
    first = parse_day(since, "--since") if since else None
    last = parse_day(until, "--until") if until else None
    if first and last and first > last:
        raise BooksError(f"--since {first} comes after --until {last}")
    with open_books(books) as opened:
        lines = read_report(opened, words, Scope(first, last))
    if csv:
        say(_csv(words, lines), nl=False)
    elif lines:
        _show(words, lines)
    else:
        say("nothing was asked then" if first or last else "nothing was asked yet")


@commands.command()
def forget(
    before: Annotated[str, typer.Option(metavar="DATE", help="The first day that stays, by UTC.")],
    books: Books = None,
) -> None:
    """Delete generations of earlier days; what each key has used of each model a day stays."""
    from pipeline.serve.books.database import open_books
    from pipeline.serve.books.report import parse_day
    from pipeline.serve.books.retention import forget as forget_before

    day = parse_day(before, "--before")
    with open_books(books) as opened:
        num_forgotten = forget_before(opened, day)
    say(f"{num_forgotten} generations of days before {day} are forgotten; their sums stay")


def _csv(words: "tuple[str, ...]", lines: "list[Line]") -> str:
    import csv
    import io

    from pipeline.serve.books.report import COLUMNS

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*words, *COLUMNS])
    writer.writerows([*map(printable, line.group), *line.numbers] for line in lines)
    return text.getvalue()


def _show(words: "tuple[str, ...]", lines: "list[Line]") -> None:
    """With the sum of all groups last, and every digit: a narrow terminal breaks the lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pipeline.serve.books.report import COLUMNS, Line
    from pipeline.serve.books.sums import Sums

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for word in words:
        table.add_column(word, overflow="fold", max_width=_GROUP_WIDTH)
    for name in COLUMNS:
        table.add_column(name.removesuffix("_tokens"), justify="right")
    every = Line(("all", *[""] * (len(words) - 1)), sum((line.sums for line in lines), Sums()))
    for line in [*lines, *[every] * (len(lines) > 1)]:
        style = "bold" if line is every else ""
        cells = [*map(printable, line.group), *line.numbers]
        table.add_row(*(Text(cell, style) for cell in cells))
    console = Console()
    needed = console.measure(table, options=console.options.update(width=_ANY_WIDTH)).maximum
    console.width = max(console.width, needed)
    console.print(table)
