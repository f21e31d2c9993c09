"""Tables in the terminal: nothing in them is cut, however narrow it is."""

from collections.abc import Collection, Sequence
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = 2  # columns of characters between two columns of a table


def print_table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    console: Console,
    *,
    keys: int = 1,
    ends: Collection[int] = (),
) -> None:
    """Print a table; columns that do not fit the console's width follow below, with the keys repeated.

    A single column that is too wide for the console is printed whole.

    Args:
        title: printed above.
        headings: of the columns.
        rows: cells; a cell may have several lines.
        console: where to print.
        keys: how many of the first columns say what a row is about: they are left-aligned and repeated.
        ends: rows (from 0) after which a line is left blank.
    """
    widths = [max(map(_width, column)) for column in zip(headings, *rows, strict=True)]
    parts: list[list[int]] = []
    room = 0
    for index in range(keys, len(headings)):
        need = _GAP + widths[index]
        if not parts or need > room:
            parts.append(list(range(keys)))
            room = console.width - sum(widths[:keys]) - _GAP * (keys - 1)
        parts[-1].append(index)
        room -= need
    console.print(Text(title, style="bold"), soft_wrap=True)
    for number, part in enumerate(parts):
        if number:
            console.print()
        whole = sum(widths[index] + _GAP for index in part) - _GAP
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0), width=whole)
        for index in part:
            heading = Text(headings[index])
            justify: Literal["left", "right"] = "left" if index < keys else "right"
            table.add_column(heading, justify=justify, no_wrap=True, min_width=widths[index])
        for at, row in enumerate(rows):
            table.add_row(*(Text(row[index]) for index in part), end_section=at in ends)
        console.print(table, crop=False)


def print_lines(lines: Sequence[str], console: Console) -> None:
    """Print remarks below a table, as they are: the terminal breaks long lines."""
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _width(cell: str) -> int:
    return max(map(cell_len, cell.split("\n")))
