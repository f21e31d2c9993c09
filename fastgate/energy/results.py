"""The result of a window: joules, seconds and their reliability."""

from dataclasses import dataclass
from typing import Any

UNAVAILABLE = "unavailable"


@dataclass(frozen=True)
class Energy:
    """Energy of one window. Unknown values are None, never 0.

    Attributes:
        name: name of the window.
        seconds: its duration.
        items: number of items processed (images, calls, ...), if given.
        per_device: joules by device: a GPU's UUID, or cpu:package-N.
        sources: source of each device's joules.
        microjoules: total change of the counters, an integer, so that laps add up exactly: 0 if the window was too
            short for them to move, None if one is unknown.
        error_bound_joules: maximum error of the sum: counters update only once per tick, and changes in power could
            hide a counter fault of up to 5 %.
            The sensors themselves are off by up to 10 %: compare results from one machine only. Counters are also read
            within a window, ten times a second: one that jumps, stalls or is reset contradicts the power limit or the
            power readings.
        warnings: reasons not to trust the numbers.
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
        """Energy of all metered devices; None if that of one is unknown or its counter did not move."""
        if self.microjoules is None or None in self.per_device.values():
            return None
        return self.microjoules / 1e6

    @property
    def mean_watts(self) -> float | None:
        """Joules per second."""
        return None if self.joules is None or self.seconds <= 0 else self.joules / self.seconds

    @property
    def joules_per_item(self) -> float | None:
        """Joules per item; None if no items were given."""
        return None if self.joules is None or not self.items else self.joules / self.items

    @property
    def items_per_joule(self) -> float | None:
        """Items per joule; None if no items were given."""
        return None if not self.joules or not self.items else self.items / self.joules

    @property
    def source(self) -> str:
        """nvml-counter, nvml-power-integral, rapl, or unavailable; the GPUs' source if CPUs are metered as well.

        It is nvml-power-integral if any GPU has no counter.
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
