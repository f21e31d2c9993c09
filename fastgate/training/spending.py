"""Seconds and joules of an epoch, kept over interruptions, and of a run; of all its processes together."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgate.energy import Energy
from fastgate.training import distributed


@dataclass
class Spending:
    """What an epoch has used so far; joules are unknown once a part of them is.

    Attributes:
        seconds: of work.
        microjoules: an integer, so that parts add up exactly; None if unknown.
        error_bound_joules: of the sum; None if unknown.
        source: where the joules come from; see :class:`fastgate.energy.Energy`.
        warnings: what the meter said, each once.
    """

    seconds: float = 0.0
    microjoules: int | None = 0
    error_bound_joules: float | None = 0.0
    source: str | None = None
    warnings: list[str] = field(default_factory=list)

    def add(self, energy: Energy) -> None:
        """Add a window of work, which every process has metered on its own device."""
        machine = platform.node()
        energy = add_energies(distributed.gather((machine, energy)))
        self.seconds += energy.seconds
        self.microjoules = _sum([self.microjoules, energy.microjoules])
        self.error_bound_joules = _sum([self.error_bound_joules, energy.error_bound_joules])
        self.source = energy.source
        self.warnings += [warning for warning in energy.warnings if warning not in self.warnings]

    @property
    def joules(self) -> float | None:
        """None if unknown, also where the work was too short for a counter to move."""
        return self.microjoules / 1e6 if self.microjoules else None


def add_energies(metered: Sequence[tuple[str, Energy]]) -> Energy:
    """What processes used at the same time, each given with its machine; every device counts once.

    A GPU is known by its UUID, a CPU package by its machine. Processes share all of their devices or none.
    """
    several = len({machine for machine, _ in metered}) > 1
    parts: dict[tuple[str, ...], Energy] = {}
    for machine, energy in metered:
        names = [f"{machine}/{key}" if several and key.startswith("cpu") else key for key in energy.per_device]
        parts.setdefault(tuple(names), energy)
    named = [(dict(zip(part.per_device, names, strict=True)), part) for names, part in parts.items()]
    return Energy(
        name=metered[0][1].name,
        seconds=max(energy.seconds for _, energy in metered),
        items=metered[0][1].items,
        per_device={names[key]: joules for names, part in named for key, joules in part.per_device.items()},
        sources={names[key]: source for names, part in named for key, source in part.sources.items()},
        microjoules=_sum([part.microjoules for part in parts.values()]),
        error_bound_joules=_sum([part.error_bound_joules for part in parts.values()]),
        warnings=tuple(dict.fromkeys(warning for _, energy in metered for warning in energy.warnings)),
    )


def describe_epoch(train: Spending, evaluation: Spending, history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds and joules of an epoch for its line of metrics; `total` adds up this and all earlier epochs."""
    seconds = train.seconds + evaluation.seconds + (history[-1]["seconds"]["total"] if history else 0.0)
    joules = {"train": train.joules, "eval": evaluation.joules}
    total = _sum([*joules.values(), history[-1].get("joules", {}).get("total") if history else 0.0])
    return {
        "seconds": {"train": train.seconds, "eval": evaluation.seconds, "total": seconds},
        "joules": {**joules, "total": total},
        "energy": {
            "source": train.source,
            "error_bound_joules": {"train": train.error_bound_joules, "eval": evaluation.error_bound_joules},
            "warnings": list(dict.fromkeys(train.warnings + evaluation.warnings)),
        },
    }


def sum_joules(history: Sequence[dict[str, Any]], kind: str) -> float | None:
    """Joules of all epochs of a run for "train" or "eval"; None if one epoch's are unknown."""
    total = _sum([line.get("joules", {}).get(kind) for line in history])
    return None if total is None else float(total)


def _sum(parts: Sequence[Any]) -> Any:
    return None if any(part is None for part in parts) else sum(parts)
