"""Schedules: values that step or ramp at given epochs, written as short strings."""

import math
import re
from dataclasses import dataclass
from itertools import pairwise

_POINT = re.compile(r"\s*([0-9.eE+-]+)\s*:\s*([0-9.eE+-]+)\s*")


@dataclass(frozen=True)
class Piecewise:
    """A schedule defined by points (epoch, value), constant or linear between them.

    Steps: the value of the last point at or before the epoch; before the first point, the first value.
    Linear: interpolated between the points, constant outside them.
    """

    points: tuple[tuple[float, float], ...]
    linear: bool = False

    def __post_init__(self) -> None:
        epochs = [epoch for epoch, _ in self.points]
        if not all(math.isfinite(number) for point in self.points for number in point):
            raise ValueError(f"points: expected finite numbers, got {self.points}")
        if not epochs or any(later <= earlier for earlier, later in pairwise(epochs)):
            raise ValueError(f"points: expected at least one, with increasing epochs, got {self.points}")

    def __call__(self, epoch: float) -> float:
        """The value at an epoch, which may be fractional."""
        if epoch <= self.points[0][0]:
            return self.points[0][1]
        for (start, low), (end, high) in pairwise(self.points):
            if epoch < end:
                return low + (high - low) * (epoch - start) / (end - start) if self.linear else low
        return self.points[-1][1]


def parse(value: float | str) -> Piecewise:
    """Parse a schedule: a number, steps "0:0, 125:2, 190:3", or a ramp "10:1 -> 50:0.5".

    The paper's rising lambda (Table 5) is "0:0, 125:2, 190:3".

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, int | float):
        return Piecewise(((0.0, float(value)),))
    linear = "->" in value
    points = []
    try:
        if ":" not in value:
            return Piecewise(((0.0, float(value)),))
        for part in value.split("->" if linear else ","):
            match = _POINT.fullmatch(part)
            if match is None:
                raise ValueError(part)
            points.append((float(match[1]), float(match[2])))
        return Piecewise(tuple(points), linear)
    except ValueError as error:
        raise ValueError(
            f'schedule: expected a number, steps "0:0, 125:2" or a ramp "10:1 -> 50:0.5" with increasing epochs, '
            f"got {value!r}"
        ) from error


def stretch(value: str, factor: float) -> str:
    """The same schedule over `factor` times as many epochs."""
    schedule = parse(value)
    separator = " -> " if schedule.linear else ", "
    return separator.join(f"{epoch * factor:.10g}:{number:.10g}" for epoch, number in schedule.points)


LAMBDA_UP = parse("0:0, 125:2, 190:3")
