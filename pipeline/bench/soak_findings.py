"""What the soak has found out: a law, what was seen, and whether it was kept."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One law's outcome."""

    law: str
    seen: str
    is_kept: bool = True


def ordered(law: str, faults: Sequence[str], seen: str = "") -> Finding:
    """Of a law that was broken as often as there are faults."""
    told = f"{len(faults)} faults, such as: {faults[0]}" if faults else "no fault"
    return Finding(law, ", ".join(filter(None, [seen, told])), not faults)


def percentiles_ms(times_s: Sequence[float]) -> str:
    """The middle and the end of them."""
    cuts = statistics.quantiles(times_s, n=100, method="inclusive")
    return f"p50 {1000 * cuts[49]:.0f} ms, p99 {1000 * cuts[98]:.0f} ms"
