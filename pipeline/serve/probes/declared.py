"""What a server declares of a model, in either format that routers read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pipeline.serve.probes.client import Client
from pipeline.serve.probes.document import find_fault
from pipeline.serve.probes.seen import Fault, Seen, passed

# The flat format's word for a feature, and the parameters that it is about.
_FEATURES = {
    "json_mode": ("response_format",),
    "logprobs": ("logprobs",),
    "reasoning": ("reasoning",),
    "structured_outputs": ("structured_outputs",),
    "tools": ("tools",),
}
_FLAT_KEYS = (
    "name",
    "input_modalities",
    "output_modalities",
    "quantization",
    "context_length",
    "max_output_length",
    "pricing",
    "supported_sampling_parameters",
)


@dataclass(frozen=True)
class Declared:
    """One model, and how its document looked."""

    model: str
    parameters: Mapping[str, Any]
    """By name; what is said of each is None in the flat format."""
    document: Seen

    def most(self, parameter: str, otherwise: float) -> float:
        """The highest value that is said to be taken."""
        descriptor = self.parameters.get(parameter)
        most = descriptor.get("max") if isinstance(descriptor, dict) else None
        return min(most, otherwise) if isinstance(most, int | float) else otherwise


async def find_declared(client: Client, model: str) -> Declared:
    """Of the model of that id, or of the first; Fault if no document can be read at all."""
    parts = urlsplit(client.url)
    new = await _list(client, f"{parts.scheme}://{parts.netloc}/provider/v1/models")
    if new and "schema_version" in (document := _choose(new, model)):
        if fault := find_fault(document):
            seen = Seen("failed", f"schema {document['schema_version']}: {fault}")
        else:
            seen = passed(f"schema {document['schema_version']} of {len(new)} models")
        return Declared(document["id"], _parameters(document), seen)
    old = await _list(client, f"{client.url}/models")
    if not old:
        raise Fault(f"neither /provider/v1/models nor {parts.path}/models lists a model")
    document = _choose(old, model)
    return Declared(document["id"], _flat_parameters(document), _see_flat(document, len(old)))


async def _list(client: Client, url: str) -> list[dict[str, Any]]:
    """Empty for anything that is no list of models."""
    answer = await client.get(url)
    if answer.status != 200:
        return []
    try:
        models = answer.json().get("data")
    except Fault:
        return []
    listed = models if isinstance(models, list) else []
    return [one for one in listed if isinstance(one, dict) and isinstance(one.get("id"), str)]


def _choose(documents: Sequence[dict[str, Any]], model: str) -> dict[str, Any]:
    for document in documents:
        if document["id"] == model or not model:
            return document
    ids = ", ".join(document["id"] for document in documents[:5])
    raise Fault(f"{model} is not listed; there are {ids}")


def _parameters(document: Mapping[str, Any]) -> dict[str, Any]:
    """Of the text that it puts out; none if that is not by the schema."""
    parameters: dict[str, Any] = {}
    for modality in document.get("output_modalities") or ():
        if isinstance(modality, dict) and modality.get("type") == "text":
            parameters |= modality.get("supported_parameters") or {}
    return parameters


def _flat_parameters(document: Mapping[str, Any]) -> dict[str, Any]:
    names = [*(document.get("supported_sampling_parameters") or ())]
    names += document.get("supported_parameters") or ()
    for feature in document.get("supported_features") or ():
        names += _FEATURES.get(feature, ())
    return dict.fromkeys(names)


def _see_flat(document: Mapping[str, Any], num_models: int) -> Seen:
    if missing := [key for key in _FLAT_KEYS if key not in document]:
        return Seen(
            "failed", f"no schema 2.x, and of the flat keys {', '.join(missing)} are missing"
        )
    return passed(f"flat keys of {num_models} models")
