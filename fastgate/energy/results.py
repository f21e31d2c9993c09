"""What a window used: joules, seconds and how far they can be trusted."""

from dataclasses import dataclass
from typing import Any

UNAVAILABLE = "unavailable"


@dataclass(frozen=True)
class Energy:
    """Energy of one window. What is not known is None, never 0.

    Attributes:
        name: of the window.
        seconds: its duration.
        items: what was worked on (images, calls, ...), if given.
        per_device: joules by device: a board's UUID, or cpu:package-N.
        sources: where each device's joules come from.
        microjoules: by how much the counters moved, an integer, so that laps add up exactly: 0 where the window was
            too short for them to move, None if one is unknown.
        error_bound_joules: how far off the sum may be: readings are renewed only once per tick, and where the power
            changes, a fault of the counter of up to 5 % could hide.
            The sensors themselves are off by up to 10 %: compare on one machine. Counters are also read between the
            edges of a window, ten times a second: one that jumps, stands still or is reset contradicts the power limit
            or the power that was read meanwhile.
        warnings: what one should know before trusting the numbers.
    """

    name: str
    seconds: float
    items: int | None
    per_device: dict[str, float | None]
    sources: dict[str, str]
    microjoules: int | None
    error_bound_joules: float | None
    warnings: tuple[str, ...]

    @property
    def joules(self) -> float | None:
        """Energy of all metered devices, None if that of one is unknown or its counter did not move."""
        if self.microjoules is None or None in self.per_device.values():
            return None
        return self.microjoules / 1e6

    @property
    def mean_watts(self) -> float | None:
        """Joules per second."""
        return None if self.joules is None or self.seconds <= 0 else self.joules / self.seconds

    @property
    def joules_per_item(self) -> float | None:
        """Joules per item, None where no items were given."""
        return None if self.joules is None or not self.items else self.joules / self.items

    @property
    def items_per_joule(self) -> float | None:
        """Items per joule, None where no items were given."""
        return None if not self.joules or not self.items else self.items / self.joules

    @property
    def source(self) -> str:
        """nvml-counter, nvml-power-integral, rapl, or unavailable: that of the GPUs where CPUs are metered beside them.

        One board without a counter makes it nvml-power-integral.
        """
        if self.microjoules is None or not self.sources:
            return UNAVAILABLE
        for kind in ("nvml-power-integral", "nvml-counter", "rapl"):
            if kind in self.sources.values():
                return kind
        return UNAVAILABLE

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "joules": self.joules,
            "seconds": self.seconds,
            "mean_watts": self.mean_watts,
            "items": self.items,
            "joules_per_item": self.joules_per_item,
            "source": self.source,
            "error_bound_joules": self.error_bound_joules,
            "per_device": self.per_device,
            "warnings": list(self.warnings),
        }
