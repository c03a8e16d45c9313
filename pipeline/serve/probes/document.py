"""OpenRouter's provider schema 2.4, as far as it is about text."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_Usd = Annotated[str, Field(pattern=r"^\d+(\.\d+)?$")]
_Count = Annotated[int, Field(ge=1)]
# What a descriptor may say beside its type, and whether it must.
_OF_DESCRIPTORS: dict[str, set[str]] = {
    "range": {"min", "max", "unit"},
    "integer": {"min", "max", "unit"},
    "boolean": set(),
    "enum": {"values"},
    "array": {"items", "max_items"},
    "object": {"properties"},
    "unknown": set(),
}
_NEEDED = {"enum": "values", "object": "properties"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Descriptor(_Strict):
    """What a parameter takes."""

    type: Literal["range", "integer", "boolean", "enum", "array", "object", "unknown"]
    min: float | None = None
    max: float | None = None
    default: str | float | bool | None = None
    values: list[str | float] | None = None
    unit: Literal["second", "pixel", "byte", "token", "character"] | None = None
    max_items: _Count | None = None
    properties: dict[str, "Descriptor"] | None = None
    items: "Descriptor | None" = None

    @model_validator(mode="after")
    def _fits_its_type(self) -> "Descriptor":
        said = self.model_fields_set - {"type", "default"}
        if others := said - _OF_DESCRIPTORS[self.type]:
            raise ValueError(f"{self.type} takes no {', '.join(sorted(others))}")
        needed = _NEEDED.get(self.type)
        if needed and needed not in said:
            raise ValueError(f"{self.type} needs {needed}")
        return self


class _Limit(_Strict):
    value: _Count
    unit: Literal["second", "pixel", "byte", "token", "character"] | None = None


class _Price(BaseModel):
    """What it depends on is not looked at."""

    type: Literal["prompt", "cached_prompt", "cache_write", "completion", "internal_reasoning"]
    unit: str
    cost_usd: _Usd


class _RequestPrice(BaseModel):
    type: Literal["request", "web_search"]
    unit: Literal["request", "search"]
    cost_usd: _Usd


class _Capacity(_Strict):
    type: str
    unit: str
    per: Literal["minute", "hour", "day"] | None = None
    value: _Count

    @model_validator(mode="after")
    def _has_its_window(self) -> "_Capacity":
        if (self.type == "concurrency") != (self.per is None):
            raise ValueError("all but concurrency are per minute, hour or day")
        return self


class _TextInputs(_Strict):
    max_context_length: _Limit | None = None
    max_prompt_length: _Limit | None = None


class _TextIn(_Strict):
    type: Literal["text"]
    supported_inputs: _TextInputs | None = None
    pricing: list[_Price] = []
    capacity: list[_Capacity] = []
    passthrough_parameters: dict[str, Descriptor] = {}


class _TextOut(_Strict):
    type: Literal["text"]
    supported_parameters: dict[str, Descriptor]
    max_length: _Limit | None = None
    streaming: bool | None = None
    pricing: list[_Price] = []
    capacity: list[_Capacity] = []
    passthrough_parameters: dict[str, Descriptor] = {}


class _Slug(_Strict):
    slug: str


class _Datacenter(_Strict):
    country_code: Annotated[str, Field(pattern="^[A-Z]{2}$")]
    region: str | None = None


class Document(_Strict):
    """One model."""

    schema_version: Annotated[str, Field(pattern=r"^2\.\d+$")]
    id: str
    name: str
    input_modalities: list[dict[str, Any]] = Field(min_length=1)
    output_modalities: list[dict[str, Any]] = Field(min_length=1)
    hugging_face_id: str | None = None
    created: int | None = None
    quantization: (
        Literal[
            "int4", "int8", "fp4", "mxfp4", "nvfp4", "fp6", "fp8", "mxfp8", "fp16", "bf16", "fp32"
        ]
        | None
    ) = None
    tokenizer: str | None = None
    description: str | None = None
    pricing: list[_RequestPrice] = []
    capacity: list[_Capacity] = []
    passthrough_parameters: dict[str, Descriptor] = {}
    deprecation_date: str | None = None
    is_ready: bool | None = None
    is_free: bool | None = None
    service_tier: Literal["flex", "priority", "ultrafast", "fast"] | None = None
    discount_to_user: Annotated[float, Field(lt=1)] | None = None
    openrouter: _Slug | None = None
    datacenters: list[_Datacenter] = []
    deployment_region: str | None = None
    compliance: Any = None
    """Retired: accepted, and read by nobody."""


def find_fault(document: Mapping[str, Any]) -> str | None:
    """Where it is not by the schema, first of all; None is nowhere."""
    try:
        Document.model_validate(document)
        for side, kind in (("input_modalities", _TextIn), ("output_modalities", _TextOut)):
            for modality in document[side]:
                if modality.get("type") == "text":
                    kind.model_validate(modality)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
    return None
