"""Whether measured times can be trusted: their spread over the rounds, and the load of the machine."""

from collections.abc import Mapping
from typing import Any

from fastgate.reports.runs import look_up
from fastgate.training.records import Row, Rows

# a definition, as a share of the median: half of the passes lie between the quartiles
_SPREAD = 0.1
# a definition, as a share of the cores: above them threads wait for one, ours among them
_LOAD = 1.25

_QUARTILES = {"latency_ms": "latency", "images_per_second": "images per second"}


def doubt_times(rows: Rows, environment: Mapping[str, Any]) -> str:
    """A warning about the latencies and rates of a summary's rows; empty if there is no reason, or none is known.

    The machine counts as busy when the quartiles of a time are further apart than 10 % of its median, or when more
    threads wanted to run, over the minute before, than 1.25 times its cores (the run's own threads among them).
    """
    reasons = []
    for field, name in _QUARTILES.items():
        spreads = {network: spread for network, row in rows.items() if (spread := _spread(row, field)) is not None}
        if wide := [f"{spread:.0%} ({network})" for network, spread in spreads.items() if spread > _SPREAD]:
            reasons.append(
                f"the quartiles of {name} lie {', '.join(wide)} of the median apart, more than {_SPREAD:.0%}"
            )
    load = max((known for row in rows.values() if (known := row.get("load_average")) is not None), default=None)
    cores = environment.get("cpu_cores")
    if load is not None and cores and load > _LOAD * cores:
        reasons.append(f"the load average was {load:.1f} on {cores} cores")
    if not reasons:
        return ""
    return f"busy machine: {'; '.join(reasons)}; measure the times again on a quiet machine before they are compared"


def _spread(row: Row, field: str) -> float | None:
    """Distance of the quartiles as a share of the median."""
    quartiles, median = look_up(row, f"{field}_quartiles"), look_up(row, field)
    return None if quartiles is None else float((quartiles[1] - quartiles[0]) / median)
