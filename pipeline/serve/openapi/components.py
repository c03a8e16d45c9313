"""Pydantic's models as the schemas that the parts of an OpenAPI document share."""

import re
from typing import Any

import orjson
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from pipeline.serve.openapi.fields import FIELDS
from pipeline.serve.openapi.operations import Ask

Schema = dict[str, Any]
REFERENCE = "#/components/schemas/"


class _Plain(GenerateJsonSchema):
    """Without what says nothing: titles made of names, and null as what an absent field is."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - of no field
        return False

    def default_schema(self, schema: Any) -> Schema:
        told = super().default_schema(schema)
        return {key: value for key, value in told.items() if (key, value) != ("default", None)}

    def tagged_union_schema(self, schema: Any) -> Schema:
        """What one member takes another may take, too: it is the tag that decides."""
        return {"anyOf": super().tagged_union_schema(schema)["oneOf"]}


class Components:
    """`schemas` by name, as they are asked for."""

    def __init__(self) -> None:
        self.schemas: dict[str, Schema] = {}

    def refer(self, model: type[BaseModel]) -> Schema:
        """A reference to a model under its own name."""
        return self._keep(model.__name__, self._describe(model, ""))

    def refer_to_body(self, ask: Ask) -> Schema:
        """A reference to the fields of all its models in one schema."""
        described = [self._describe(model, prefix) for prefix, model in ask.models.items()]
        fields: dict[str, Schema] = {}
        for part in described:
            for name, schema in part["properties"].items():
                if name not in ask.without:
                    fields.setdefault(name, {**schema, "description": FIELDS[name]})
        body: Schema = {"type": "object", "properties": fields}
        body["required"] = described[0].get("required", [])
        if ask.needs:
            body["anyOf"] = [{"required": [name]} for name in ask.needs]
        return self._keep(ask.name, body)

    def _keep(self, name: str, schema: Schema) -> Schema:
        assert self.schemas.setdefault(name, schema) == schema, f"two parts are called {name}"
        return {"$ref": REFERENCE + name}

    def _describe(self, model: type[BaseModel], prefix: str) -> Schema:
        """Its schema; the schemas of its parts are kept."""
        text = orjson.dumps(model.model_json_schema(schema_generator=_Plain)).decode()
        # What is private to a module is private to nobody who reads its schema.
        told = orjson.loads(re.sub(r'"#/\$defs/_*', f'"{REFERENCE}{prefix}', text))
        for name, part in told.pop("$defs", {}).items():
            self._keep(prefix + name.lstrip("_"), _untitled(part))
        return _untitled(told)


def fields_of(model: type[BaseModel]) -> dict[str, Schema]:
    """The schemas of a flat model's fields; what may be absent is not said to be null as well."""
    fields = model.model_json_schema(schema_generator=_Plain)["properties"]
    return {name: _unless_null(schema) for name, schema in fields.items()}


def _unless_null(schema: Schema) -> Schema:
    forms = [form for form in schema.pop("anyOf", ()) if form != {"type": "null"}]
    return {**schema, **forms[0]} if len(forms) == 1 else schema


def _untitled(schema: Schema) -> Schema:
    return {key: value for key, value in schema.items() if key != "title"}
