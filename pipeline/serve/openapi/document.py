"""The API as an OpenAPI document, from the routes that there are."""

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus

from pipeline.serve.api.routes import PREFIXES, Routes
from pipeline.serve.openapi.components import Components, Schema, fields_of
from pipeline.serve.openapi.operations import OPERATIONS, Operation

_ABOUT = (
    "OpenRouter's API over models of your own. A request field is honoured, refused with the "
    "reason, or named in the header X-Ignored-Parameters."
)
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_REQUEST_HEADERS = {
    "HTTP-Referer": "The site that asks, for the books.",
    "X-OpenRouter-Title": "What asks, for the books; X-Title is the same.",
    "X-Session-Id": "What requests of one conversation have in common, as session_id.",
    "X-OpenRouter-Metadata": "enabled tells how the request came to its answer.",
    "X-OpenRouter-Cache": "true tells the same reply again if the same was asked before.",
    "X-OpenRouter-Cache-TTL": "For how many seconds a reply is kept: 1 to 86400, by default 300.",
    "X-OpenRouter-Cache-Clear": "true forgets what was kept and makes the reply anew.",
}
_REPLY_HEADERS = {
    "X-Generation-Id": "For /generation.",
    "X-Provider-Name": "Who has answered.",
    "X-Ignored-Parameters": "Fields of the request that changed nothing, if there are any.",
    "X-OpenRouter-Cache-Status": "HIT or MISS, of a request that asks for the cache.",
}
_RETRY_AFTER = {"Retry-After": "Seconds after which to try again."}
_STREAM = "Server-sent events: with `stream: true`, each has an object {event} as its data."
_MODEL_IN_PATH = {"author": "What precedes the slash of a model's id.", "slug": "What follows it."}
_HASH_IN_PATH = {"hash": "SHA-256 of a key's text."}
_TEXT = {"type": "string"}


def openapi_document(routes: Routes) -> Schema:
    """Of every route; one that nothing is said of is a KeyError."""
    components = Components()
    paths: dict[str, Schema] = {}
    for path, (method, _) in routes.of_server.items():
        told = {method.lower(): _operation(path, OPERATIONS[path], components)}
        paths[path] = {"servers": [{"url": "/"}], **told}
    for path, (method, _) in routes.of_api.items():
        paths[path] = {method.lower(): _operation(path, OPERATIONS[path], components)}
    for path in routes.of_models:
        told = {"get": _operation(path, OPERATIONS[path], components)}
        paths[path.replace("{model}", "{author}/{slug}")] = told
    for path, handlers in routes.of_keys.items():
        names = {method.lower(): f"{method} {path}" for method in handlers}
        paths[path] = {m: _operation(n, OPERATIONS[n], components) for m, n in names.items()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pipeline",
            "version": importlib.metadata.version("pipeline"),
            "description": _ABOUT,
        },
        "servers": [{"url": prefix} for prefix in PREFIXES],
        "tags": [{"name": name} for name in dict.fromkeys(o.group for o in OPERATIONS.values())],
        "paths": paths,
        "components": {"schemas": components.schemas, "securitySchemes": _KEYS},
    }


def _operation(path: str, operation: Operation, components: Components) -> Schema:
    told: Schema = {
        "tags": [operation.group],
        "operationId": re.sub(r"\W+", "_", path).strip("_"),
        "summary": operation.summary,
        "security": [{name: []} for name in _KEYS] if operation.needs_key else [],
        "parameters": list(_parameters(path, operation)),
        "responses": _responses(operation, components),
    }
    if operation.ask:
        schema = components.refer_to_body(operation.ask)
        content = {"schema": schema, "example": operation.ask.example}
        told["requestBody"] = {"required": True, "content": {"application/json": content}}
    return told


def _parameters(path: str, operation: Operation) -> Iterator[Schema]:
    if "{model}" in path:
        yield from _texts("path", _MODEL_IN_PATH, required=True)
    if "{hash}" in path:
        yield from _texts("path", _HASH_IN_PATH, required=True)
    if isinstance(operation.query, Mapping):
        yield from _texts("query", operation.query, required="id" in operation.query)
    elif operation.query:
        for name, schema in fields_of(operation.query).items():
            description = schema.pop("description", "")
            yield _parameter("query", name, schema) | {"description": description}
    if operation.event:
        yield from _texts("header", _REQUEST_HEADERS, required=False)


def _texts(place: str, described: Mapping[str, str], *, required: bool) -> Iterator[Schema]:
    for name, description in described.items():
        told = {"description": description, "required": required}
        yield _parameter(place, name, _TEXT) | told


def _parameter(place: str, name: str, schema: Schema) -> Schema:
    # A list is one value with commas.
    style = {"style": "form", "explode": False} if schema.get("type") == "array" else {}
    return {"name": name, "in": place, "required": False, "schema": schema, **style}


def _responses(operation: Operation, components: Components) -> Schema:
    told: Schema = {}
    if operation.answer:
        content = {operation.content_type: {"schema": components.refer(operation.answer)}}
        success = str(operation.status)
        told[success] = {"description": HTTPStatus(operation.status).phrase, "content": content}
    if operation.event:
        event = components.refer(operation.event)["$ref"].rpartition("/")[2]
        stream = {"description": _STREAM.format(event=event)}
        content["text/event-stream"] = {"schema": stream}
        told["200"]["headers"] = _headers(_REPLY_HEADERS)
    for status in operation.refusals:
        schema = components.refer(operation.refusal)
        told[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": schema}},
        }
        if status in (429, 503):
            told[str(status)]["headers"] = _headers(_RETRY_AFTER)
    return told


def _headers(described: Mapping[str, str]) -> Schema:
    return {name: {"description": text, "schema": _TEXT} for name, text in described.items()}
