"""Energy of phases that follow one another: what the callbacks for other trainers have in common."""

import sys
from typing import Any

from fastgate.energy.meter import EnergyMeter
from fastgate.energy.results import Energy
from fastgate.energy.sums import add_parts


class Timeline:
    """Divides the time of a run among phases, without gaps: one reading ends a phase and begins the next.

    Every change of phase waits for the metered work, so phases are to be epochs and evaluations, not steps.
    """

    def __init__(self, meter: EnergyMeter) -> None:
        self._meter = meter
        self._spent: dict[str, list[Energy]] = {}
        meter.lap()  # what came before is no phase

    def end_phase(self, phase: str) -> None:
        """Count what was used since the last change of phase as `phase`."""
        self._spent.setdefault(phase, []).append(self._meter.lap(name=phase))

    def collect(self, phase: str) -> dict[str, Any]:
        """Joules (None if unknown), seconds, source and warnings of a phase since it was last collected."""
        laps = self._spent.pop(phase, [])
        if not laps:
            return {"joules": None, "seconds": 0.0, "source": None, "warnings": []}
        total = add_parts(laps)
        return {
            "joules": total.joules or None,  # counters that did not move at all have not seen the phase
            "seconds": total.seconds,
            "source": total.source,
            "warnings": [*_one_of_several(), *total.warnings],
        }


def _one_of_several() -> list[str]:
    """What to know of joules that other processes of the run add to; they are not asked, for they may not listen."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    processes = torch.distributed.get_world_size()
    return [] if processes == 1 else [f"metered by one process of {processes}: what its own devices used"]
