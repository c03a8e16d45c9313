"""What is said of a key when it is made or changed, on the command line and over HTTP."""

import contextlib
import datetime
import re
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    WithJsonSchema,
)

from pipeline.errors import BooksError
from pipeline.serve.asking.faults import first_fault
from pipeline.serve.offer.price import PICODOLLARS, parse_usd

Reset = Literal["daily", "weekly", "monthly"]
"""When a limit begins anew: at midnight UTC, on Mondays, on the first of a month."""
Priority = Literal["high", "normal", "low"]
"""Whose requests go first where several wait for a model."""
PRIORITIES: dict[Priority | None, int] = {"high": 1, "normal": 0, None: 0, "low": -1}
MAX_USD = 9_000_000
"""More pico-dollars than this buys are no number that every database holds."""
_MAX_COUNT = 2**31 - 1
_MAX_NAME = 256
_NAME = r"^[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]*$"  # one line, and not blank
_NOTHING = "none"


def _usd(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise ValueError("give a number of US dollars, such as 2.50")
    # 0.1 + 0.2 is a sum that people mean, down to the last digit that counts.
    picodollars = parse_usd(f"{value:.12f}")
    if picodollars > MAX_USD * PICODOLLARS:
        raise ValueError(f"at most {MAX_USD} US dollars")
    return picodollars


def _moment(value: Any) -> datetime.datetime:
    if not isinstance(value, str):
        raise ValueError("give a text such as 2027-01-31T00:00:00Z")
    try:
        moment = datetime.datetime.fromisoformat(value)
    except ValueError as error:
        raise ValueError(f"{value[:40]!r} is no time such as 2027-01-31T00:00:00Z") from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    if moment <= datetime.datetime.now(datetime.UTC):
        raise ValueError(f"{value[:40]} is over")
    return moment


def _slug(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w-]+)?", value):
        raise ValueError(f"{value[:80]!r} is no model such as acme/support")
    return value


Count = Annotated[PositiveInt, Field(le=_MAX_COUNT)]
Usd = Annotated[
    int, BeforeValidator(_usd), WithJsonSchema({"type": "number", "minimum": 0, "maximum": MAX_USD})
]


class KeyChange(BaseModel):
    """What is not said stays as it is, null takes a limit away, unknown fields change nothing."""

    model_config = ConfigDict(frozen=True, strict=True, use_attribute_docstrings=True)

    name: str = Field(default_factory=str, max_length=_MAX_NAME, pattern=_NAME)
    disabled: bool = Field(default_factory=bool)
    limit: Usd | None = None
    """Of US dollars."""
    limit_reset: Reset | None = None
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    """Of prompts and replies together."""
    streams: Count | None = None
    """Requests at the same time, streamed or not."""
    priority: Priority | None = None
    """Where requests wait for a model, those of a higher one go first."""
    models: (
        Annotated[list[Annotated[str, BeforeValidator(_slug)]], Field(max_length=1000)] | None
    ) = None
    """The only ones that it may ask, by their slugs."""
    expires_at: Annotated[datetime.datetime, BeforeValidator(_moment)] | None = None
    log_content: bool = Field(default_factory=bool)
    """Whether requests and replies are kept, word by word; those of `zdr` are not."""
    include_byok_in_limit: bool = Field(default_factory=bool)
    """Changes nothing: nobody brings keys to others here."""

    @property
    def columns(self) -> dict[str, Any]:
        """What was said, as the books have it."""
        said = self.model_dump(exclude_unset=True, exclude={"include_byok_in_limit"})
        if "limit" in said:
            said["limit_picodollars"] = said.pop("limit")
        if "expires_at" in said:
            moment = said.pop("expires_at")
            said["expires_ms"] = int(moment.timestamp() * 1000) if moment else None
        return said


class NewKey(KeyChange):
    """The same with a name."""

    name: str = Field(max_length=_MAX_NAME, pattern=_NAME)


def read_columns(**words: str | None) -> dict[str, Any]:
    """Of a command line's options, by the fields they mean; `none` takes a limit away.

    BooksError names the option that is wrong.
    """
    said: dict[str, Any] = {name: word for name, word in words.items() if word is not None}
    said = {name: None if word == _NOTHING else word for name, word in said.items()}
    if limit := said.get("limit"):
        with contextlib.suppress(InvalidOperation):
            said["limit"] = Decimal(limit)
    if models := said.get("models"):
        said["models"] = [word.strip() for word in models.split(",")]
    try:
        return KeyChange.model_validate(said, strict=False).columns
    except ValidationError as error:
        place, what = first_fault(error, said)
        option = place.partition(".")[0].replace("_", "-").replace("expires-at", "expires")
        raise BooksError(f"--{option}: {what}") from error
