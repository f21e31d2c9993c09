"""Energy of consecutive phases, for the callbacks for other trainers."""

import sys
from typing import Any

from fastgate.energy.meter import EnergyMeter
from fastgate.energy.results import Energy
from fastgate.energy.sums import add_parts


class Timeline:
    """Divides the time of a run into phases, without gaps: one reading ends a phase and begins the next.

    Every phase change synchronizes with the device, so use phases for epochs and evaluations, not for steps.
    """

    def __init__(self, meter: EnergyMeter) -> None:
        self._meter = meter
        self._spent: dict[str, list[Energy]] = {}
        meter.lap()  # discards the time before the first phase

    def end_phase(self, phase: str) -> None:
        """Count the energy since the last phase change as `phase`."""
        self._spent.setdefault(phase, []).append(self._meter.lap(name=phase))

    def collect(self, phase: str) -> dict[str, Any]:
        """Joules (None if unknown), seconds, source and warnings of a phase since the last call."""
        laps = self._spent.pop(phase, [])
        if not laps:
            return {"joules": None, "seconds": 0.0, "source": None, "warnings": []}
        total = add_parts(laps)
        return {
            "joules": total.joules or None,  # counters that did not move have not measured the phase
            "seconds": total.seconds,
            "source": total.source,
            "warnings": [*_one_of_several(), *total.warnings],
        }


def _one_of_several() -> list[str]:
    """Warning if the run has other processes, whose energy is not included: they may not take part in an exchange."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    processes = torch.distributed.get_world_size()
    return [] if processes == 1 else [f"metered by one process of {processes}: energy of its own devices only"]
