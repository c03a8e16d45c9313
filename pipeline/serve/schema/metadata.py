"""`openrouter_metadata`: how a request came to its answer, for clients that want to know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.serve.routing.endpoint import Answering, Endpoint
from pipeline.serve.routing.route import Route


@dataclass(frozen=True)
class Attempt:
    """One endpoint that was asked."""

    endpoint: Endpoint
    status: int
    """As an HTTP status: 200 where it has answered."""

    def document(self) -> dict[str, Any]:
        """On the wire."""
        return {
            "provider": self.endpoint.provider,
            "model": self.endpoint.served.slug,
            "status": self.status,
        }


def metadata_body(
    route: Route, attempts: Sequence[Attempt], answering: Answering | None, stages: Sequence[str]
) -> dict[str, Any]:
    """Of a reply that is under way, or of a failure after the route was found."""
    selected = attempts[-1].endpoint if attempts else None
    available = [
        {
            "provider": endpoint.provider,
            "model": endpoint.served.slug,
            "selected": endpoint is selected,
        }
        for endpoint in route.endpoints
    ]
    body: dict[str, Any] = {
        "requested": route.requested,
        "strategy": route.strategy,
        "region": None,
        "summary": _summary(available),
        "attempt": max(len(attempts), 1),
        "is_byok": False,
        "endpoints": {"total": len(available), "available": available},
        "attempts": [attempt.document() for attempt in attempts],
    }
    if answering and answering.ignored:
        body["params"] = {"ignored": list(answering.ignored)}
    if stages:
        body["pipeline"] = [{"type": stage, "name": stage.replace("_", "-")} for stage in stages]
    return body


def _summary(available: Sequence[dict[str, Any]]) -> str:
    """As the public service words it."""
    chosen = next((entry["provider"] for entry in available if entry["selected"]), None)
    return f"available={len(available)}" + (f", selected={chosen}" if chosen else "")
