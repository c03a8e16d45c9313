"""The keys of the server's users."""

from typing import Annotated

import typer
from typer import echo as say

commands = typer.Typer(no_args_is_help=True)
Books = Annotated[
    str | None,
    typer.Option(
        help="A file, a folder or a database URL.",
        show_default="one file of the user's for everything served",
    ),
]


@commands.command()
def create(
    name: Annotated[str, typer.Option(help="Whose key it is, or what for.")],
    books: Books = None,
) -> None:
    """Make a key and print it; it cannot be shown again."""
    from pipeline.serve.books import open_books
    from pipeline.serve.keys import Keys

    with open_books(books) as opened:
        say(Keys(opened).create(name))


@commands.command("list")
def list_keys(books: Books = None) -> None:
    """Say which keys there are, without what would let anybody in."""
    from datetime import UTC, datetime

    from pipeline.serve.books import open_books
    from pipeline.serve.keys import Keys

    with open_books(books) as opened:
        keys = Keys(opened).all()
    width = max([len(key.name) for key in keys], default=0)
    for key in keys:
        created = datetime.fromtimestamp(key.created_ms / 1000, UTC)
        state = "  disabled" if key.disabled else ""
        say(f"{key.name:{width}}  {key.label}  {created:%Y-%m-%d %H:%M} UTC{state}")
    if not keys:
        say("no keys yet: pipeline keys create --name NAME makes one")
