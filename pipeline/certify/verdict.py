"""What a certificate means: torch-free, for the command line and the server."""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import GateMissed

MAX_FLOAT32_ERROR = 5e-4
"""Largest error of a logit in float32, as a share of the largest logit.

It is the adapter's product added to the weights, or applied beside them: the same sum in another
order. Reassociation alone cost 2e-6 over the demo's 30 layers, and may cost 1e-4 in a wider and
deeper model; what is over five times that is no rounding, but other weights.
"""


def judge(artefacts: dict[str, dict[str, Any]], limits: Mapping[str, float]) -> dict[str, Any]:
    """A certificate from what was measured: each artefact passes or misses its limit."""
    for name, measured in artefacts.items():
        measured["max_mean_kl"] = limits[name]
        measured["passed"] = (
            measured["mean_kl"] <= limits[name]  # never true of NaN, like the next
            and _is_only_rounding(measured)
            and measured.get("wrong_values", 0) == 0
        )
    return {"artefacts": artefacts, "passed": all(a["passed"] for a in artefacts.values())}


def refuse_if_missed(certificate: Mapping[str, Any]) -> None:
    """Raise GateMissed naming each artefact that is too far from the model as trained."""
    missed = {name: a for name, a in certificate["artefacts"].items() if not a["passed"]}
    if missed:
        faults = ", ".join(f"{name} ({_explain(a)})" for name, a in missed.items())
        raise GateMissed(f"not certified: {faults}; see certify.max_mean_kl in the recipe")


def _is_only_rounding(measured: Mapping[str, Any]) -> bool:
    if "float32_max_logit_error" not in measured:
        return True  # a GGUF file: it has no float32 weights to compare
    allowed = MAX_FLOAT32_ERROR * measured["max_logit"]
    return bool(measured["float32_max_logit_error"] <= allowed)


def _explain(measured: Mapping[str, Any]) -> str:
    said = (
        f"mean KL {measured['mean_kl']:.2g}, allowed {measured['max_mean_kl']}, "
        f"wrong values {measured.get('wrong_values', 0)}"
    )
    if "float32_max_logit_error" not in measured:
        return said
    error, allowed = measured["float32_max_logit_error"], MAX_FLOAT32_ERROR * measured["max_logit"]
    return f"{said}, float32 logit error {error:.2g}, allowed {allowed:.2g}"
