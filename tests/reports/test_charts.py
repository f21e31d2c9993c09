import re
from itertools import pairwise
from typing import Literal

import pytest

from fastgate.reports.charts import Curve, Strip, draw_curves, draw_gate_map, round_epochs, round_logs, round_ticks
from fastgate.reports.quantities import format_joules, format_seconds, format_si, shorten


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]),
        (0.26, 0.9944, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 2532992.0, [0, 1e6, 2e6, 3e6]),
        (0.0, 0.0, [0]),
        (5.0, 5.0, [4, 6]),
    ],
)
def test_round_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 7, 10, 40, 300, 350])
def test_round_epochs(epochs: int) -> None:
    ticks = round_epochs(epochs)
    assert ticks == sorted(set(ticks)) and ticks[0] == 1 and ticks[-1] <= epochs
    assert len(ticks) <= 6


@pytest.mark.parametrize(("first", "last"), [(28, 40), (201, 300), (5, 6), (3, 3), (7, 12)])
def test_round_epochs_of_the_last_part(first: int, last: int) -> None:
    ticks = round_epochs(last, first)
    assert ticks == sorted(set(ticks)) and ticks[0] == first and ticks[-1] <= last and len(ticks) <= 7


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.002, 2.3, [0.001, 0.01, 0.1, 1, 10]),
        (0.3, 4.0, [0.2, 0.5, 1, 2, 5]),
        (0.2, 0.5, [0.2, 0.5]),
        (1.0, 1.0, [1, 2]),
        (0.03, 0.9, [0.02, 0.05, 0.1, 0.2, 0.5, 1]),
    ],
)
def test_round_logs(low: float, high: float, ticks: list[float]) -> None:
    assert round_logs(low, high) == pytest.approx(ticks)


def ticks_of(svg: str) -> dict[float, float]:
    """Value of a tick of the vertical axis -> its height in the picture."""
    return {float(text): float(y) - 3.5 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)}


def points_of(svg: str) -> list[tuple[float, float]]:
    (found,) = re.findall(r'points="([^"]+)"', svg)
    return [(float(x), float(y)) for x, y in (point.split(",") for point in found.split())]


@pytest.mark.parametrize("scale", ["zero", "range"])
@pytest.mark.parametrize("values", [[0.0], [3.0], [2.0, 2.0], [0.1, 0.9, 0.5], [0.0, 0.0]])
def test_points_are_where_their_values_are(values: list[float], scale: Literal["zero", "range"]) -> None:
    curve = Curve("c0", list(enumerate(values, 1)))
    svg = draw_curves([curve, Curve("c1", [])], (1, len(values)), str, scale=scale)
    (low, bottom), (high, top) = min(ticks_of(svg).items()), max(ticks_of(svg).items())
    for (_, y), value in zip(points_of(svg), values, strict=True):
        assert y == pytest.approx(bottom + (value - low) / (high - low) * (top - bottom), abs=0.11)
    assert low == 0 or scale == "range"


def test_points_on_a_logarithmic_axis() -> None:
    svg = draw_curves([Curve("c0", [(1, 10.0), (2, 1.0), (3, 0.001)])], (1, 3), lambda x: f"{x:g}", scale="log")
    ticks = ticks_of(svg)
    assert sorted(ticks) == [0.001, 0.01, 0.1, 1, 10]
    assert [y for _, y in points_of(svg)] == [ticks[10], ticks[1], ticks[0.001]]


def test_the_last_value_stands_beside_the_end_of_its_curve() -> None:
    """However close the curves end, their labels lie a line apart and within the picture."""
    curves = [Curve(f"c{i}", [(1, 0.2), (2, 0.9 + i / 1000)]) for i in range(5)] + [Curve("c5", [(1, 0.1)])]
    svg = draw_curves(curves, (1, 2), lambda x: f"{x:.3f}")
    labels = re.findall(r'<text class="last (c\d)" x="([\d.]+)" y="([\d.]+)">([\d.]+)<', svg)
    assert {style: text for style, _, _, text in labels} == {
        **{f"c{i}": f"{0.9 + i / 1000:.3f}" for i in range(5)}, "c5": "0.100",
    }  # fmt: skip
    heights = sorted(float(y) for style, _, y, _ in labels if style != "c5")
    assert min(high - low for low, high in pairwise(heights)) == pytest.approx(11)
    x = {style: float(x) for style, x, _, _ in labels}
    assert x["c5"] < x["c0"] == x["c4"]


def test_what_lies_below_the_floor_is_outside_the_plot() -> None:
    svg = draw_curves([Curve("c0", [(1, 0.93), (2, 0.1), (3, 0.94)])], (1, 3), str, scale="range", floor=0.925)
    assert min(ticks_of(svg)) > 0.9
    (plot,) = re.findall(r'<svg x="0" y="([\d.]+)" width="\d+" height="([\d.]+)"', svg)
    top, height = map(float, plot)
    inside = [top <= y <= top + height for _, y in points_of(svg)]
    assert inside == [True, False, True]


def test_phases_lie_above_their_epochs() -> None:
    phases = [("open", 1, 4), ("search", 5, 16), ("settled", 17, 40)]
    curve = Curve("c0", [(4.5, 0.0), (16.5, 1.0)])
    svg = draw_curves([curve], (1, 40), str, strips=[Strip("shared", phases)])
    bands = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    assert [name for name, _, _ in bands] == ["open", "search", "settled"]
    ends = [float(x) + float(width) for _, x, width in bands]
    starts = [float(x) for _, x, _ in bands]
    changes = [x for x, _ in points_of(svg)]
    assert ends[:2] == pytest.approx(changes, abs=0.11) and starts[1:] == pytest.approx(changes, abs=0.11)
    assert "<title>search: epoch 5 to 16</title>" in svg
    late = draw_curves([curve], (28, 40), str, strips=[Strip("shared", phases)])
    assert re.findall(r'<rect class="(\w+)"', late) == ["settled"]


def test_the_gate_map_covers_what_was_seen() -> None:
    rows = [[1.0, 1.0, 0.5, 0.0], [0.25]]
    svg = draw_gate_map(rows, 6)
    assert 'viewBox="0 0 6 2"' in svg
    cells = {}
    for opacity, path in re.findall(r'fill-opacity="([\d.]+)" d="([^"]+)"', svg):
        for x, y, width in re.findall(r"M(\d+) (\d+)\.08h(\d+)", path):
            cells |= {(int(y), int(x) + i): float(opacity) for i in range(int(width))}
    assert cells == {(0, 0): 1.0, (0, 1): 1.0, (0, 2): 0.5, (1, 0): 0.25}
    closed = re.search(r'class="closed" d="([^"]+)"', svg)
    assert closed is not None
    assert sum(map(int, re.findall(r"h(\d+)v", closed[1]))) == 5  # under the open ones and where all is closed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_si(1353344), "1.35 M"),
        (format_si(272186), "272 k"),
        (format_si(999_950), "1 M"),
        (format_si(12), "12"),
        (format_si(0), "0"),
        (format_si(3.1e15), "3.1 P"),
        (format_joules(0.0021), "2.1 mJ"),
        (format_joules(None), "unknown"),
        (format_seconds(0.3794), "379 ms"),
        (format_seconds(14.67), "14.7 s"),
        (format_seconds(99.97), "1 min 40 s"),
        (format_seconds(5000), "1 h 23 min"),
    ],
)
def test_numbers_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected


def test_remarks_that_differ_in_their_numbers_stand_once() -> None:
    remarks = ["GPU-1a2: 0.41 s is short", "GPU-1a2: 1.5 s is short", "GPU-1b3: 2 s is short", "shared"]
    assert shorten(remarks) == ["GPU-1a2: 0.41 s is short (and 1 more like it)", "GPU-1b3: 2 s is short", "shared"]
