"""A file in YAML to frozen sections: nothing is guessed, and each fault has its place and words."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from pipeline.errors import RecipeError

# Beside its own, PyYAML lets these through: a date that is none, an unhashable key, a deep nesting.
_NOT_YAML = (yaml.YAMLError, ValueError, TypeError, RecursionError)


class Section(BaseModel):
    """A part of a file: frozen, and every key it does not know is an error.

    Numbers may be strings, for PyYAML reads 2e-4 as one; but they are finite.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic would take for the number 1 or 0
            raise ValueError("no key takes true or false; quote a word that is meant as one")
        return value


SectionT = TypeVar("SectionT", bound=Section)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML lets the second of two equal keys win silently; this loader refuses it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key!r} stands here twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str) -> Any:
    """What a text says; ValueError, in one line, if it is not YAML."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except _NOT_YAML as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_mapping(path: Path, kind: str, example: str) -> dict[Any, Any]:
    """What a file says; RecipeError if it is no mapping in YAML, such as the example.

    `kind` is what the file should be, for the sentence.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise RecipeError(f"{path} cannot be read as a {kind}: {reason or error}") from error
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a {kind}: it must be a mapping such as `{example}`")
    return values


def validate(section: type[SectionT], values: dict[Any, Any], where: str, kind: str) -> SectionT:
    """Plain values as a section; RecipeError with every fault of them in one message."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        faults = "\n".join(f"  {line}" for line in _explain(error, section, kind))
        raise RecipeError(f"{where} is not a valid {kind}:\n{faults}") from error


def _explain(error: ValidationError, root: type[Section], kind: str) -> Iterator[str]:
    faults = error.errors()
    told: set[tuple[int | str, ...]] = set()
    for fault in faults:
        choice = _choice_at(fault["loc"], root)
        if choice is not None:
            if choice not in told:
                told.add(choice)
                alike = [other for other in faults if _choice_at(other["loc"], root) == choice]
                yield _explain_choice(choice, alike)
            continue
        place = ".".join(str(part) for part in fault["loc"])
        size = len(fault["loc"])
        if fault["type"] == "too_short" and any(
            len(other["loc"]) > size and other["loc"][:size] == fault["loc"] for other in faults
        ):
            continue  # pydantic counts only the items that are fine, and the others are told
        if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = _keys_at(fault["loc"][:-1], root)
            close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
            yield f"{place}: unknown key; {hint}"
        else:
            yield f"{place or kind}: {fault['msg'].removeprefix('Value error, ')}"


def _explain_choice(choice: tuple[int | str, ...], faults: Sequence[Any]) -> str:
    """One line for a key that takes values of several kinds, each of which pydantic tells apart."""
    said = [fault["msg"].removeprefix("Input should be ").partition(",")[0] for fault in faults]
    said = [words.replace("a valid tuple", "a list") for words in said]
    return f"{'.'.join(map(str, choice))}: Input should be {' or '.join(dict.fromkeys(said))}"


def _choice_at(
    location: Sequence[int | str], section: type[BaseModel]
) -> tuple[int | str, ...] | None:
    """The part of a location that is a key for values of several kinds, if one is on the way."""
    for size, part in enumerate(location, start=1):
        if not isinstance(part, str) or part not in section.model_fields:
            continue
        annotation = section.model_fields[part].annotation
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        if get_origin(annotation) in (Union, UnionType) and len(kinds) > 1:
            return tuple(location[:size]) if size < len(location) else None
        section = next(_sections(annotation), section)
    return None


def _keys_at(location: Sequence[int | str], section: type[BaseModel]) -> list[str]:
    """The keys there may be at a place, found by walking the sections' annotations."""
    for part in location:
        if not isinstance(part, str) or part not in section.model_fields:
            continue
        annotation = section.model_fields[part].annotation
        for kind in (annotation, *get_args(annotation)):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                return [field.name for field in dataclasses.fields(kind)]
        section = next(_sections(annotation), section)
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
