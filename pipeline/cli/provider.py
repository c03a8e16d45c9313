"""Being listed by a router."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.serve.probe import Finding

commands = typer.Typer(no_args_is_help=True)
_STYLES = {"passed": "green", "failed": "bold red", "not shown": "yellow", "not declared": "dim"}


@commands.callback()
def provider() -> None:
    """A group, though there is one command in it."""


@commands.command()
def check(
    url: Annotated[str, typer.Argument(help="Any server's base URL, which ends in /v1.")],
    key_env: Annotated[
        str, typer.Option(help="The environment variable that has a key to it.")
    ] = "OPENROUTER_API_KEY",
    model: Annotated[
        str, typer.Option(help="The id to ask.", show_default="the first that is listed")
    ] = "",
) -> None:
    """Ask a server what a router would: is what it declares true? 3 is that something failed."""
    import asyncio
    import os

    from pipeline.errors import GateMissed
    from pipeline.serve.probe import probe

    findings = asyncio.run(_show(probe(url, os.environ.get(key_env, ""), model)))
    failed = [finding.check for finding in findings if finding.verdict == "failed"]
    if failed:
        raise GateMissed(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


async def _show(findings: "AsyncIterator[Finding]") -> "list[Finding]":
    """Print a table that grows with what is found."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    table, shown = Table("check", "result", "seen"), []

    def add(finding: "Finding") -> None:
        style = _STYLES[finding.verdict]
        table.add_row(finding.check, Text(finding.verdict, style), Text(finding.seen))
        shown.append(finding)

    add(await anext(findings))  # of a server that cannot be asked there is no table
    with Live(table, vertical_overflow="visible"):
        async for finding in findings:
            add(finding)
    return shown
