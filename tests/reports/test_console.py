"""Tables in terminals of any width: every heading and every cell is there, whole."""

import io
import re

import pytest
from rich.console import Console

from fastgate.reports.console import print_table

HEADINGS = ["network", "acc. %", "MACs", "params", "latency ms", "images/s"]
ROWS = [
    ["unpruned", "99.17±0.68", "40.8 M", "272 k", "1.533", "126,305"],
    ["equal-macs", "98.44±0.75", "1.35 M", "156 k", "0.978", "9"],
]


def printed(width: int, *, keys: int = 1) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_table("title", HEADINGS, ROWS, console, keys=keys)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("keys", [0, 1, 2])
@pytest.mark.parametrize("width", [10, 25, 40, 60, 80, 200])
def test_nothing_is_cut(width: int, keys: int) -> None:
    lines = printed(width, keys=keys)
    widest = max(len(lines) for lines in HEADINGS + [cell for row in ROWS for cell in row])
    assert max(map(len, lines)) <= max(width, keys * (widest + 2) + widest)
    for wanted in (HEADINGS, *ROWS):
        cells = [re.split(r" {2,}", line.strip()) for line in lines]
        first = [part for part in cells if part[0] == wanted[0]] if keys else [part for part in cells if part]
        found = {cell for part in first for cell in part}
        assert found >= set(wanted)


def test_a_table_that_fits_is_one() -> None:
    lines = printed(80)
    assert lines[0] == "title" and len(lines) == 5
    assert [line.split()[0] for line in lines[3:]] == ["unpruned", "equal-macs"]


def test_columns_that_do_not_fit_follow_beside_the_same_keys() -> None:
    lines = printed(40)
    assert [line.split()[0] for line in lines if line.startswith(("unpruned", "equal-macs"))] == [
        *("unpruned", "equal-macs", "unpruned", "equal-macs")
    ]
