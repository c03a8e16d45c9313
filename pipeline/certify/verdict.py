"""What a certificate means: torch-free, for the command line and the server."""

import math
from collections.abc import Mapping
from typing import Any

from pipeline.errors import GateMissed


def judge(artefacts: dict[str, dict[str, Any]], limits: Mapping[Any, float]) -> dict[str, Any]:
    """A certificate from what was measured: each artefact passes or misses its limit."""
    for name, measured in artefacts.items():
        limit = limits.get(name)
        within = measured["mean_kl"] <= (math.inf if limit is None else limit)  # never of NaN
        measured["max_mean_kl"] = limit
        measured["passed"] = within and measured.get("wrong_values", 0) == 0
    return {"artefacts": artefacts, "passed": all(a["passed"] for a in artefacts.values())}


def refuse_if_missed(certificate: Mapping[str, Any]) -> None:
    """Raise GateMissed naming each artefact that is too far from the model as trained."""
    missed = {name: a for name, a in certificate["artefacts"].items() if not a["passed"]}
    if missed:
        faults = ", ".join(
            f"{name} (mean KL {a['mean_kl']:.2g}, allowed {a['max_mean_kl']}, "
            f"wrong values {a.get('wrong_values', 0)})"
            for name, a in missed.items()
        )
        raise GateMissed(f"not certified: {faults}; see certify.max_mean_kl in the recipe")
