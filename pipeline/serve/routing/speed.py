"""Which endpoint is the faster one, by what was measured; what was not measured comes after it."""

import math

from pipeline.serve.asking.preferences import Cutoffs, Preferences
from pipeline.serve.books.measured import Percentiles
from pipeline.serve.routing.endpoint import Endpoint

_MS = 1000


def latency(endpoint: Endpoint) -> float:
    """The less the better."""
    measured = endpoint.measured.latency_ms
    return measured.p50 if measured else math.inf


def slowness(endpoint: Endpoint) -> float:
    """Of its throughput; the less the better."""
    measured = endpoint.measured.throughput
    return -measured.p50 if measured else math.inf


def is_too_slow(endpoint: Endpoint, wanted: Preferences) -> bool:
    """Whether it is known to be slower than the client prefers."""
    most, least = wanted.preferred_max_latency, wanted.preferred_min_throughput
    if most is None and least is None:
        return False
    measured = endpoint.measured
    is_late = any(told > cutoff * _MS for told, cutoff in _pairs(measured.latency_ms, most))
    return is_late or any(told < cutoff for told, cutoff in _pairs(measured.throughput, least))


def _pairs(
    measured: Percentiles | None, wanted: float | Cutoffs | None
) -> list[tuple[float, float]]:
    """What was measured beside what is wanted."""
    if measured is None or wanted is None:
        return []
    cutoffs = wanted if isinstance(wanted, Cutoffs) else Cutoffs(p50=wanted)
    pairs = (
        (measured.p50, cutoffs.p50),
        (measured.p75, cutoffs.p75),
        (measured.p90, cutoffs.p90),
        (measured.p99, cutoffs.p99),
    )
    return [(told, cutoff) for told, cutoff in pairs if cutoff is not None]
