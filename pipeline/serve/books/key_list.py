"""Keys as a terminal shows them: what each may do and has used."""

import asyncio
import contextlib
import datetime
import time

from sqlalchemy import Engine

from pipeline.serve.books.keys import Key, Keys
from pipeline.serve.books.ledger import Ledger
from pipeline.serve.books.spending import Spent
from pipeline.serve.offer.price import usd_text


def describe_keys(books: Engine, key_id: int | None = None) -> list[str]:
    """A line for each, oldest first, or that of one."""
    every = Keys(books).all()
    today = datetime.datetime.now(datetime.UTC).date()
    with contextlib.closing(Ledger(books)) as ledger:
        spent = asyncio.run(ledger.spent_by_key(today))
    width = max([len(key.name) for key in every], default=0)
    return [
        "  ".join([f"{key.name:{width}}", *_describe(key, spent.get(key.id, Spent()))])
        for key in every
        if key_id in (None, key.id)
    ]


def _describe(key: Key, spent: Spent) -> list[str]:
    said = [key.label, key.hash[:8], f"made {_moment(key.created_ms)}"]
    said.append(f"used {usd_text(spent.ever)} USD")
    if key.limit_picodollars is not None:
        left = max(0, key.limit_picodollars - spent.by_period[key.limit_reset])
        reset = f" {key.limit_reset}" if key.limit_reset else ""
        limit = usd_text(key.limit_picodollars)
        said.append(f"limit {limit} USD{reset}, {usd_text(left)} left")
    for amount, what in (
        (key.requests_per_minute, "requests a minute"),
        (key.tokens_per_minute, "tokens a minute"),
        (key.streams, "at the same time"),
    ):
        if amount is not None:
            said.append(f"{amount} {what}")
    if key.priority is not None:
        said.append(f"{key.priority} priority")
    if key.models is not None:
        said.append(f"asks {', '.join(key.models)}")
    if key.expires_ms is not None:
        word = "expired" if key.is_expired(time.time()) else "expires"
        said.append(f"{word} {_moment(key.expires_ms)}")
    said += ["content is logged"] * key.log_content
    said += ["manages keys"] * key.is_management + ["disabled"] * key.disabled
    return said


def _moment(time_ms: int) -> str:
    return f"{datetime.datetime.fromtimestamp(time_ms / 1000, datetime.UTC):%Y-%m-%d %H:%M} UTC"
