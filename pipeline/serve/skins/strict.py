"""Reading what is a dialect's own, so that a failure names the client's own field."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import RequestError
from pipeline.serve.asking.faults import first_fault


class Strict(BaseModel):
    """1 is no string and "1" is no number. What is not declared is kept in `model_extra`."""

    model_config = ConfigDict(strict=True, extra="allow")


Model = TypeVar("Model", bound=Strict)


def read_as(
    model: type[Model], value: Any, place: str = "", error_type: str = "invalid_request"
) -> Model:
    """Check what stands at a place of the body; RequestError names the first wrong field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        where, what = first_fault(error, value)
        names = [name for name in (place, where) if name]
        raise RequestError(f"{'.'.join(names)}: {what}", 400, error_type) from error
