"""What the books of a soak say beside what its clients were told."""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pipeline.bench.soak_ask import Told
from pipeline.bench.soak_client import Client
from pipeline.bench.soak_findings import Finding, ordered
from pipeline.bench.soak_server import books_of

PRICE = {"prompt": "0.000000123457", "completion": "0.000000654321", "cached": "0.000000012345"}
_PROMPT, _COMPLETION, _CACHED = 123_457, 654_321, 12_345
_USD = 10**12
"""Of pico-dollars, in which the books count."""
Row = Mapping[str, Any]


def read_rows(folder: Path) -> dict[str, Row]:
    """Every generation in the books, by its id."""
    with closing(sqlite3.connect(f"file:{books_of(folder)}?mode=ro", uri=True)) as books:
        books.row_factory = sqlite3.Row
        return {row["id"]: dict(row) for row in books.execute("SELECT * FROM generations")}


def balance(folder: Path, told: Told) -> list[Finding]:
    """Whether each usage that was told is a row, and each row costs what its tokens do."""
    rows = read_rows(folder)
    missing = [
        fault for name, usage in told.usages.items() for fault in _compare(name, usage, rows)
    ]
    dear = [f"{name} costs {row['cost_picodollars']}" for name, row in rows.items() if _is_off(row)]
    num_cancelled = sum(row["cancelled"] for row in rows.values())
    seen = f"{len(rows)} rows, {num_cancelled} of them cancelled"
    return [
        ordered("each usage that was told is in the books", missing, f"{len(told.usages)} told"),
        ordered("each row costs its tokens times their price", dear, seen),
    ]


async def check_sums(client: Client, folder: Path) -> Finding:
    """Whether a server tells of a key what its rows come to."""
    credits, key = await client.get("/credits"), await client.get("/key")
    total = sum(row["cost_picodollars"] for row in read_rows(folder).values())
    seen = (credits["data"]["total_usage"], key["data"]["usage"])
    text = f"/credits {seen[0]}, /key {seen[1]}, rows {total / _USD} USD"
    return Finding(
        "the rows come to what a restarted server tells", text, {*seen} == {total / _USD}
    )


def _compare(name: str, usage: Any, rows: Mapping[str, Row]) -> Iterator[str]:
    if name not in rows:
        yield f"{name} is not there"
        return
    row = rows[name]
    said = (
        usage["prompt_tokens"],
        usage["completion_tokens"],
        usage["completion_tokens_details"]["reasoning_tokens"],
        usage["cost"],
    )
    kept = (
        row["prompt_tokens"],
        row["completion_tokens"],
        row["reasoning_tokens"],
        row["cost_picodollars"] / _USD,
    )
    if said != kept:
        yield f"{name} is {kept} and was told as {said}"


def _is_off(row: Row) -> bool:
    """Whether the cost is another one; what failed or came to nothing is free."""
    if row["error_type"] or not row["completion_tokens"]:
        return bool(row["cost_picodollars"])
    fresh = row["prompt_tokens"] - row["cached_tokens"]
    prompt = fresh * _PROMPT + row["cached_tokens"] * _CACHED
    return bool(prompt + row["completion_tokens"] * _COMPLETION != row["cost_picodollars"])
