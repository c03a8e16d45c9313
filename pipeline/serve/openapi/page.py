"""The OpenAPI document as a page for people."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from pipeline.serve.openapi.components import REFERENCE, Schema

TEMPLATE = Path(__file__).parents[1] / "pages" / "docs.html"
_EXAMPLE_HOST = "http://127.0.0.1:8000"
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} of them",
    "maxItems": "at most {} of them",
    "maxProperties": "at most {} of them",
    "pattern": "matches {}",
    "default": "by default {}",
}


def render_page(document: Schema) -> str:
    """HTML without scripts, complete in itself."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"bounds": _bounds, "part": _part, "curl": _curl}
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(document=document, groups=_groups(document))


def _groups(document: Schema) -> dict[str, list[dict[str, Any]]]:
    """Operations by tag, each with the path that it is asked for by."""
    groups: dict[str, list[dict[str, Any]]] = {tag["name"]: [] for tag in document["tags"]}
    for path, item in document["paths"].items():
        prefix = (item.get("servers") or document["servers"])[0]["url"].rstrip("/")
        for method in item.keys() - {"servers"}:
            operation = {**item[method], "method": method.upper(), "path": prefix + path}
            groups[operation["tags"][0]].append(operation)
    return groups


def _part(reference: str) -> str:
    """The name of a schema that is referred to."""
    return reference.removeprefix(REFERENCE)


def _bounds(schema: Schema) -> str:
    """In words; of several forms, those of each."""
    return "; ".join(_all_bounds(schema))


def _all_bounds(schema: Schema) -> Iterator[str]:
    for form in schema.get("anyOf", ()):
        yield from _all_bounds(form)
    for name, words in _BOUNDS.items():
        if name in schema and schema[name] not in ("", []):
            yield words.format(schema[name])


def _curl(operation: dict[str, Any]) -> str:
    """A command that asks for it."""
    path = operation["path"].replace("{author}", "AUTHOR").replace("{slug}", "SLUG")
    needed = [p["name"] for p in operation["parameters"] if p["in"] == "query" and p["required"]]
    query = "".join(f"?{name}=…" for name in needed)
    words = [f"curl '{_EXAMPLE_HOST}{path}{query}'"]
    if operation["security"]:
        words.append('-H "Authorization: Bearer $OPENROUTER_API_KEY"')
    if body := operation.get("requestBody"):
        words.append("-H 'Content-Type: application/json'")
        words.append(f"-d '{json.dumps(body['content']['application/json']['example'])}'")
    return " \\\n  ".join(words)
