"""Seconds and joules of an epoch, kept across interruptions, and of a run; of all its processes together."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastgate import processes
from fastgate.energy import Energy
from fastgate.energy.sums import add_devices, add_energies, add_known
from fastgate.training.records import EpochRecord


@dataclass
class Spending:
    """What an epoch has used so far; joules are unknown once a part of them is.

    Attributes:
        seconds: of work.
        microjoules: an integer, so that parts add up exactly; None if unknown.
        error_bound_joules: of the sum; None if unknown.
        source: where the joules come from; see :class:`fastgate.energy.Energy`.
        warnings: those of the meter, each once.
        per_device: joules by device, None where unknown or while its counter has not moved.
    """

    seconds: float = 0.0
    microjoules: int | None = 0
    error_bound_joules: float | None = 0.0
    source: str | None = None
    warnings: list[str] = field(default_factory=list)
    per_device: dict[str, float | None] = field(default_factory=dict)

    def add(self, energy: Energy) -> None:
        """Add a window of work, which every process has metered on its own device."""
        machine = platform.node()
        energy = add_energies(processes.gather((machine, energy)))
        self.seconds += energy.seconds
        parts = [(self.per_device, self.microjoules), (energy.per_device, energy.microjoules)]
        self.per_device = add_devices(parts)
        self.microjoules = add_known([self.microjoules, energy.microjoules])
        self.error_bound_joules = add_known([self.error_bound_joules, energy.error_bound_joules])
        self.source = energy.source
        self.warnings += [warning for warning in energy.warnings if warning not in self.warnings]

    @property
    def joules(self) -> float | None:
        """None if unknown, also where the work was too short for the counter of one device to move."""
        return None if not self.microjoules or None in self.per_device.values() else self.microjoules / 1e6


def describe_epoch(train: Spending, evaluation: Spending, seconds: float, joules: float | None) -> EpochRecord:
    """Seconds and joules of an epoch for its record; `total` adds them to those of the epochs before."""
    seconds += train.seconds + evaluation.seconds
    joules = add_known([train.joules, evaluation.joules, joules])
    return {
        "seconds": {"train": train.seconds, "eval": evaluation.seconds, "total": seconds},
        "joules": {"train": train.joules, "eval": evaluation.joules, "total": joules},
        "energy": {
            "source": train.source,
            "error_bound_joules": {"train": train.error_bound_joules, "eval": evaluation.error_bound_joules},
            "warnings": list(dict.fromkeys(train.warnings + evaluation.warnings)),
        },
    }


def sum_joules(history: Sequence[EpochRecord], kind: Literal["train", "eval"]) -> float | None:
    """Joules of all epochs of a run for "train" or "eval"; None if one epoch's are unknown."""
    total = add_known([record.get("joules", {}).get(kind) for record in history])
    return None if total is None else float(total)
