"""The keys of the server's users."""

from typing import Annotated, Literal

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
Which = Annotated[
    str, typer.Argument(metavar="KEY", help="Its name, its label or how its hash begins.")
]
Limit = Annotated[
    str | None, typer.Option(metavar="USD", help="What may be spent with it, such as 2.50.")
]
LimitReset = Annotated[
    Literal["daily", "weekly", "monthly", "none"] | None,
    typer.Option(help="When spending is counted anew, by UTC."),
]
RequestsPerMinute = Annotated[
    str | None, typer.Option(metavar="N", help="Requests in any minute, at most.")
]
TokensPerMinute = Annotated[
    str | None, typer.Option(metavar="N", help="Tokens in any minute, prompts and replies.")
]
Streams = Annotated[
    str | None, typer.Option(metavar="N", help="Requests at the same time, streamed or not.")
]
Priority = Annotated[
    Literal["high", "normal", "low", "none"] | None,
    typer.Option(help="Where requests wait for a model, those of a higher one go first."),
]
Models = Annotated[
    str | None, typer.Option(metavar="A/B,C/D", help="The only models that it may ask.")
]
Expires = Annotated[
    str | None, typer.Option(metavar="ISO", help="From when on it opens nothing, as 2027-01-31.")
]


LogContent = Annotated[
    bool | None,
    typer.Option("--log-content/--no-log-content", help="Keep its requests and replies, whole."),
]


@commands.command()
def create(  # noqa: PLR0913 - each is an option
    name: Annotated[str, typer.Option(help="Whose key it is, or what for.")],
    limit: Limit = None,
    limit_reset: LimitReset = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    streams: Streams = None,
    priority: Priority = None,
    models: Models = None,
    expires: Expires = None,
    management: Annotated[
        bool, typer.Option("--management", help="It manages keys, and asks for no reply.")
    ] = False,
    log_content: Annotated[
        bool, typer.Option("--log-content", help="Keep its requests and replies, whole.")
    ] = False,
    books: Books = None,
) -> None:
    """Make a key and print it; it cannot be shown again."""
    from pipeline.serve.books.allowance import read_columns
    from pipeline.serve.books.database import open_books
    from pipeline.serve.books.keys import Keys

    columns = read_columns(
        limit=limit,
        limit_reset=limit_reset,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        streams=streams,
        priority=priority,
        models=models,
        expires_at=expires,
    )
    columns |= {"log_content": True} if log_content else {}
    with open_books(books) as opened:
        say(Keys(opened).create(name, columns, is_management=management))


@commands.command("list")
def list_keys(books: Books = None) -> None:
    """Say which keys there are, without what would let anybody in."""
    from pipeline.serve.books.database import open_books
    from pipeline.serve.books.key_list import describe_keys

    with open_books(books) as opened:
        lines = describe_keys(opened)
    for line in lines:
        say(line)
    if not lines:
        say("no keys yet: pipeline keys create --name NAME makes one")


@commands.command()
def limit(  # noqa: PLR0913 - each is an option
    key: Which,
    limit: Limit = None,
    limit_reset: LimitReset = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    streams: Streams = None,
    priority: Priority = None,
    models: Models = None,
    expires: Expires = None,
    log_content: LogContent = None,
    books: Books = None,
) -> None:
    """Change what a key may do; `none` takes a limit away, what is not said stays."""
    from pipeline.errors import BooksError
    from pipeline.serve.books.allowance import read_columns

    columns = read_columns(
        limit=limit,
        limit_reset=limit_reset,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        streams=streams,
        priority=priority,
        models=models,
        expires_at=expires,
    )
    columns |= {} if log_content is None else {"log_content": log_content}
    if not columns:
        raise BooksError("nothing to change: give --limit, --requests-per-minute or another limit")
    _change(key, columns, books)


@commands.command()
def disable(key: Which, books: Books = None) -> None:
    """Let a key open nothing until it is enabled; a running server knows within 5 seconds."""
    _change(key, {"disabled": True}, books)


@commands.command()
def enable(key: Which, books: Books = None) -> None:
    """Let a key in again."""
    _change(key, {"disabled": False}, books)


@commands.command()
def rotate(key: Which, books: Books = None) -> None:
    """Print a new text of a key, which keeps its limits and use; the old one opens nothing."""
    from pipeline.serve.books.database import open_books
    from pipeline.serve.books.keys import Keys

    with open_books(books) as opened:
        keys = Keys(opened)
        say(keys.rotate(keys.named(key)))


@commands.command()
def delete(key: Which, books: Books = None) -> None:
    """Delete a key; what it was used for stays in the books."""
    from pipeline.serve.books.database import open_books
    from pipeline.serve.books.keys import Keys

    with open_books(books) as opened:
        keys = Keys(opened)
        found = keys.named(key)
        keys.delete(found)
    say(f"{found.name} {found.label} is deleted")


def _change(word: str, columns: dict[str, object], books: str | None) -> None:
    from pipeline.serve.books.database import open_books
    from pipeline.serve.books.key_list import describe_keys
    from pipeline.serve.books.keys import Keys

    with open_books(books) as opened:
        keys = Keys(opened)
        changed = keys.named(word)
        keys.change(changed, columns)
        for line in describe_keys(opened, changed.id):
            say(line)
