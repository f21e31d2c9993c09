"""Charts as inline SVG: their colours come from the page's style sheet, so they follow its light and dark."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

_WIDTH, _PLOT = 360, 170  # of the picture; of the plot's height
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 62, 8, 22
_STRIP, _THIN = 13, 5  # height of a strip of phases with its words, and without
_LABEL = 11  # height of a line of text
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


@dataclass(frozen=True)
class Strip:
    """Phases above a chart: a band for each.

    Attributes:
        style: CSS class that gives it its colour.
        phases: (name, first epoch, last epoch).
    """

    style: str
    phases: Sequence[tuple[str, int, int]]


def round_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers, evenly spaced, that enclose low and high."""
    span = (high - low) or abs(high) or 1.0
    size = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= span / count * (1 - 1e-9))
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def round_logs(low: float, high: float) -> list[float]:
    """Round numbers that enclose low and high, both above 0: powers of ten; of two decades 1, 2 and 5 of each."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first > 2:
        return [10.0**i for i in range(first, last + 1)]
    ticks = [factor * 10.0**i for i in range(first, last + 1) for factor in (1, 2, 5)]
    begin = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    end = min(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[begin : max(end, begin + 1) + 1]


def round_epochs(epochs: int, first: int = 1) -> list[int]:
    """The first epoch and round ones up to the last."""
    ticks = [int(tick) for tick in round_ticks(first if first > 1 else 0, epochs) if tick == int(tick)]
    apart = (epochs - first) / 12  # nearer ones would run into the first
    return [first, *(tick for tick in ticks if first + max(apart, 0.5) < tick <= epochs)]


def draw_curves(
    curves: Sequence[Curve],
    epochs: tuple[int, int],
    form: Callable[[float], str],
    *,
    scale: Literal["zero", "range", "log"] = "zero",
    floor: float | None = None,
    strips: Sequence[Strip] = (),
) -> str:
    """Curves over epochs, labelled with their last values.

    Args:
        curves: at least one point in all.
        epochs: the first and the last one of the horizontal axis.
        form: writes a number of the vertical axis.
        scale: whether the vertical axis begins at 0, or just below the lowest point, or is logarithmic.
        floor: the lowest value that the axis has to show; what lies below it leaves the picture.
        strips: phases of the runs; where they change a line goes through the plot.
    """
    values = [y for curve in curves for _, y in curve.points]
    low = 0.0 if scale == "zero" else min(values) if floor is None else max(floor, min(values))
    ticks = round_logs(low, max(values)) if scale == "log" else round_ticks(low, max(values))
    if len(ticks) == 1:
        ticks.append(ticks[0] + 1)
    first, last = epochs
    thin = _STRIP if len(strips) <= 3 else _THIN
    top = _TOP + len(strips) * thin
    right, bottom = _WIDTH - _RIGHT, top + _PLOT
    measure = math.log10 if scale == "log" else float
    lowest, highest = measure(ticks[0]), measure(ticks[-1])

    def across(x: float) -> float:
        return round(_LEFT + ((x - first) / (last - first) if last > first else 0.5) * (right - _LEFT), 1)

    def place(x: float, y: float) -> tuple[float, float]:
        return across(x), round(bottom - (measure(y) - lowest) / (highest - lowest) * _PLOT, 1)

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {bottom + _BOTTOM}">']
    for tick in ticks:
        _, y = place(first, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5}" text-anchor="end">{form(tick)}</text>')
    for epoch in round_epochs(last, first):
        x = across(epoch)
        parts.append(f'<path class="grid" d="M{x} {bottom}v4"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 15}" text-anchor="middle">{epoch}</text>')
    for index, strip in enumerate(strips):
        parts += _draw_strip(strip, _TOP / 2 + index * thin, thin, bottom, epochs, across)
    # a picture in the picture: what leaves the plot is not drawn
    parts.append(f'<svg x="0" y="{top - 2}" width="{_WIDTH}" height="{_PLOT + 4}" ')
    parts.append(f'viewBox="0 {top - 2} {_WIDTH} {_PLOT + 4}">')
    ends = []
    for curve in curves:
        placed = [place(x, y) for x, y in curve.points]
        if placed:
            points = " ".join(f"{x},{y}" for x, y in placed)
            said = ";".join(f"epoch {x}: {form(y)}" for x, y in curve.points)
            x, y = placed[-1]
            parts.append(f'<polyline class="curve {curve.style}" points="{points}" data-said="{said}"/>')
            parts.append(f'<circle class="end {curve.style}" cx="{x}" cy="{y}" r="2.5"/>')
            ends.append((y, x, curve.style.split()[0], form(curve.points[-1][1])))
    parts.append("</svg>")
    ends.sort()
    for y, (_, x, style, text) in zip(_spread([end[0] for end in ends], top, bottom), ends, strict=True):
        parts.append(f'<text class="last {style}" x="{x + 6:.1f}" y="{y + 3.5:.1f}">{text}</text>')
    return "".join([*parts, "</svg>"])


def _draw_strip(
    strip: Strip, y: float, height: int, bottom: int, epochs: tuple[int, int], across: Callable[[float], float]
) -> list[str]:
    parts = []
    first, last = epochs
    for name, begin, end in strip.phases:
        if end < first:
            continue
        left, right = across(max(begin - 0.5, first)), across(min(end + 0.5, last))
        said = f"{name}: epoch {begin}" + (f" to {end}" if end > begin else "")
        parts.append(f'<g class="phase {strip.style}"><title>{said}</title>')
        parts.append(f'<rect class="{name}" x="{left}" y="{y}" width="{right - left:.1f}" height="{height - 2}"/>')
        if begin > first:
            parts.append(f'<path d="M{left} {y}V{bottom}"/>')
        if height == _STRIP and right - left > 5.3 * len(name) + 2:
            parts.append(f'<text x="{(left + right) / 2:.1f}" y="{y + 8.5}" text-anchor="middle">{name}</text>')
        parts.append("</g>")
    return parts


def _spread(places: Sequence[float], top: float, bottom: float) -> list[float]:
    """Places of labels, in order, moved apart so that none covers another; closer than a line if there are too many."""
    if not places:
        return []
    gap = min(_LABEL, (bottom - top) / len(places))
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    limit = bottom
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved


def draw_gate_map(rows: Sequence[Sequence[float]], epochs: int) -> str:
    """A row per gate and a column per epoch, the more open the stronger; epochs to come are empty.

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
