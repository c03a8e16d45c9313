"""What a request may say of who is to answer it: its field `provider`."""

from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Sort = Literal["price", "throughput", "latency", "exacto"]
Quantization = Literal[
    "int4",
    "int8",
    "fp4",
    "mxfp4",
    "nvfp4",
    "fp6",
    "fp8",
    "mxfp8",
    "fp16",
    "bf16",
    "fp32",
    "unknown",
]


def _number(value: Any) -> Any:
    """Dollars as a number or as a text: the documentation has both."""
    try:
        return Decimal(value) if isinstance(value, str) else value
    except InvalidOperation:
        return value


_Dollars = Annotated[Decimal, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]


class _Known(BaseModel):
    """Unknown keys are ignored: newer clients send more."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


class SortBy(_Known):
    """The long form of `sort`."""

    by: Sort | None = None
    partition: Literal["model", "none"] | None = None
    """none sorts the endpoints of all models together."""


class MaxPrice(_Known):
    """USD for a million tokens; for a request, USD."""

    prompt: _Dollars | None = None
    completion: _Dollars | None = None
    request: _Dollars | None = None


class Preferences(_Known):
    """What is understood of `provider`. Preferred speeds exclude nobody, and none is measured."""

    order: list[str] | None = None
    only: list[str] | None = None
    ignore: list[str] | None = None
    allow_fallbacks: bool | None = None
    require_parameters: bool | None = None
    data_collection: Literal["allow", "deny"] | None = None
    zdr: bool | None = None
    enforce_distillable_text: bool | None = None
    quantizations: list[Quantization] | None = None
    sort: Sort | SortBy | None = None
    preferred_min_throughput: Any = None
    preferred_max_latency: Any = None
    max_price: MaxPrice | None = None

    @property
    def is_private(self) -> bool:
        """Whether no word of the request may be stored or learnt from."""
        return bool(self.zdr) or self.data_collection == "deny"

    @property
    def sorts_by_price(self) -> bool:
        """Whether the cheapest comes first."""
        return (self.sort.by if isinstance(self.sort, SortBy) else self.sort) == "price"

    @property
    def is_across_models(self) -> bool:
        """Whether what is asked for first matters less than the order asked for."""
        return isinstance(self.sort, SortBy) and self.sort.partition == "none"
