"""Charts as inline SVG: their colours come from the page's style sheet, so they follow its light and dark."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 8, 22
_SHADES = 20  # of the gate map: steps of 5%


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        style: CSS classes that give it its colour and dashes.
        points: (x, y), in order of x.
    """

    style: str
    points: Sequence[tuple[float, float]]


def round_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers, evenly spaced, that enclose low and high."""
    span = (high - low) or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= span / count * (1 - 1e-9))
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def round_epochs(epochs: int) -> list[int]:
    """The first epoch and round ones up to the last."""
    return [1, *(int(tick) for tick in round_ticks(0, epochs) if 1 < tick <= epochs and tick == int(tick))]


def draw_curves(curves: Sequence[Curve], epochs: int, form: Callable[[float], str], *, from_zero: bool) -> str:
    """Curves over the epochs 1 to `epochs`.

    Args:
        curves: at least one point in all.
        epochs: the last one of the horizontal axis.
        form: writes a number of the vertical axis.
        from_zero: whether the vertical axis begins at 0; else just below the lowest point.
    """
    values = [y for curve in curves for _, y in curve.points]
    ticks = round_ticks(0.0 if from_zero else min(values), max(values))
    if len(ticks) == 1:
        ticks.append(ticks[0] + 1)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - 1) / (epochs - 1) if epochs > 1 else 0.5
        up = (y - ticks[0]) / (ticks[-1] - ticks[0])
        return round(_LEFT + across * (right - _LEFT), 1), round(bottom - up * (bottom - _TOP), 1)

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}">']
    for tick in ticks:
        _, y = place(1, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5}" text-anchor="end">{form(tick)}</text>')
    for epoch in round_epochs(epochs):
        x, _ = place(epoch, ticks[0])
        parts.append(f'<path class="grid" d="M{x} {bottom}v4"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 15}" text-anchor="middle">{epoch}</text>')
    for curve in curves:
        placed = [place(x, y) for x, y in curve.points]
        if placed:
            points = " ".join(f"{x},{y}" for x, y in placed)
            said = ";".join(f"epoch {x}: {form(y)}" for x, y in curve.points)
            x, y = placed[-1]
            parts.append(f'<polyline class="curve {curve.style}" points="{points}" data-said="{said}"/>')
            parts.append(f'<circle class="end {curve.style}" cx="{x}" cy="{y}" r="2.5"/>')
    return "".join([*parts, "</svg>"])


def draw_gate_map(rows: Sequence[Sequence[float]], epochs: int) -> str:
    """A row per gate and a column per epoch, the stronger the more open; epochs to come are empty.

    The picture is stretched to the width it is given; every row is one unit high.
    """
    shades: defaultdict[int, list[str]] = defaultdict(list)
    for y, row in enumerate(rows):
        start = 0
        levels = [round(value * _SHADES) for value in row]
        for x, level in enumerate(levels):
            if x + 1 == len(levels) or levels[x + 1] != level:  # equal neighbours are one piece
                shades[level].append(f"M{start} {y}.08h{x + 1 - start}v.84H{start}z")
                start = x + 1
    parts = [f'<svg viewBox="0 0 {epochs} {len(rows)}" preserveAspectRatio="none">']
    parts.append(f'<path class="closed" d="{"".join(piece for pieces in shades.values() for piece in pieces)}"/>')
    for level, pieces in sorted(shades.items()):
        if level:
            parts.append(f'<path class="open" fill-opacity="{level / _SHADES:g}" d="{"".join(pieces)}"/>')
    return "".join([*parts, "</svg>"])
