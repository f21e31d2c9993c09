import re

import pytest

from fastgate.reports.charts import Curve, draw_curves, draw_gate_map, round_epochs, round_ticks
from fastgate.reports.quantities import format_joules, format_seconds, format_si


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


@pytest.mark.parametrize("from_zero", [True, False])
@pytest.mark.parametrize("values", [[0.0], [3.0], [2.0, 2.0], [0.1, 0.9, 0.5], [0.0, 0.0]])
def test_points_are_where_their_values_are(values: list[float], from_zero: bool) -> None:
    curve = Curve("c0", list(enumerate(values, 1)))
    svg = draw_curves([curve, Curve("c1", [])], len(values), str, from_zero=from_zero)
    found = re.search(r'points="([^"]+)"', svg)
    assert found is not None and svg.count("<polyline") == 1
    points = [tuple(map(float, point.split(","))) for point in found[1].split()]
    ticks = {float(text): float(y) - 3.5 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)}
    (low, bottom), (high, top) = min(ticks.items()), max(ticks.items())
    for (_, y), value in zip(points, values, strict=True):
        assert y == pytest.approx(bottom + (value - low) / (high - low) * (top - bottom), abs=0.11)
    assert min(ticks) == 0 or not from_zero


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
