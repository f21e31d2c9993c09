"""The paper's rows next to ours, in the terminal and as Markdown."""

import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fastgate.files import write_atomically
from fastgate.reports.console import print_lines, print_table
from fastgate.reports.paper_figures import draw_result
from fastgate.reports.quantities import format_joules, format_seconds


@dataclass(frozen=True)
class _Column:
    """A heading, and the cell under it of what the paper printed or we measured; "" where there is nothing."""

    heading: str
    cell: Callable[[Mapping[str, Any]], str]


def _number(name: str, decimals: int = 2) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        value = row.get(name)
        if value is None:
            return ""
        spread = row["spread"].get(name)
        return f"{value:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")

    return cell


def _open_ratio(row: Mapping[str, Any]) -> str:
    value, between = row["open_ratio"], row.get("open_range")
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        return f"{value[0]:.2f} - {value[1]:.2f}"
    if between is None or between[0] == between[1]:
        return f"{value:.2f}"
    return f"{value:.2f} ({between[0]:.2f} - {between[1]:.2f})"


def _flops(row: Mapping[str, Any]) -> str:
    value, share = row["flops"], row["flops_share"]
    if value is None:
        return ""
    millions = value if row.get("macs") is None else value / 1e6  # the paper counts in millions
    return f"{millions:.2f}" + ("" if share is None else f" ({share:.2f})")


def _macs(row: Mapping[str, Any]) -> str:
    return "" if row.get("macs") is None else f"{row['macs'] / 1e6:.2f}"


def _seconds(row: Mapping[str, Any]) -> str:
    return "" if row.get("seconds") is None else format_seconds(row["seconds"])


def _joules(row: Mapping[str, Any]) -> str:
    return format_joules(row["joules"]) if "joules" in row else ""


_COLUMNS = (
    _Column("unpruned %", _number("unpruned")),
    _Column("top-1 %", _number("accuracy")),
    _Column("live gates %", _number("live_accuracy")),
    _Column("drop", _number("drop")),
    _Column("open %", _open_ratio),
    _Column("R_polar", _number("polarization", 4)),
    _Column("FLOPs cut %", _number("flops_cut")),
    _Column("FLOPs M (rel)", _flops),
    _Column("MACs M", _macs),
    _Column("training", _seconds),
    _Column("energy", _joules),
)
# characters of a name in the terminal
_NAME_WIDTH = 26
_WORDS = ("data set", "model", "by")
# columns that belong to one table of the paper; the others go with every table
_SPECIAL = {"table3": {"unpruned %", "FLOPs cut %"}, "table4": {"R_polar"}}
_SPECIAL |= {"figure4": {"FLOPs cut %"}, "figure5": _SPECIAL["table3"]}
_ALL_SPECIAL = set().union(*_SPECIAL.values())

_EXPLANATIONS = (
    "top-1: test accuracy of the network without gates, last epoch; live gates: of the network as trained; drop: "
    "points below the unpruned network.",
    "FLOPs: fvcore's count, the paper's convention; MACs: of convolutions and linear layers; both without gate heads. "
    "training, energy: all epochs of one seed's training, evaluation left out; training is the time that passed, "
    "other jobs on the machine included.",
)


def _write_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a line for what the paper prints, below it a line for ours; empty columns are left out."""
    special = _SPECIAL.get(result["target"], set())
    columns = [column for column in _COLUMNS if column.heading in special or column.heading not in _ALL_SPECIAL]
    lines: list[list[str]] = []
    for row in result["rows"]:
        versions = [("quoted" if _is_quoted(row) else "paper", row["paper"]), (_whose(row), row["ours"])]
        shown = [(by, values) for by, values in versions if values is not None]
        if row["pending"] or row["reason"]:
            shown.append(("ours: none yet" if row["pending"] else "ours: none, see below", None))
        for index, (by, values) in enumerate(shown):
            name = (row["dataset"], row["name"]) if index == 0 else ("", "")
            lines.append([*name, by, *("" if values is None else column.cell(values) for column in columns)])
    headings = [*_WORDS, *(column.heading for column in columns)]
    # a column that says nothing goes: what was not metered is explained below the table
    kept = [i for i in range(len(headings)) if i in (1, 2) or {line[i] for line in lines} - {"", "unknown"}]
    if len({row["dataset"] for row in result["rows"]}) == 1:
        kept.remove(0)
    return [headings[i] for i in kept], [[line[i] for i in kept] for line in lines]


def _whose(row: Mapping[str, Any]) -> str:
    if row["ours"] is None:
        return ""
    seeds = len(row["ours"]["seeds"])
    return f"ours: {row['ours']['network']}" + (f", {seeds} seeds" if seeds > 1 else "")


def _remarks(result: Mapping[str, Any]) -> list[str]:
    ours = [row["ours"] for row in result["rows"] if row["ours"] is not None]
    reasons = dict.fromkeys(
        text for row in ours if row["joules"] is None for text in row["energy"]["warnings"] or ["the reading failed"]
    )
    lines = [*result["notes"], *_EXPLANATIONS]
    if quoted := [f"{row['name']}: {row['paper']['source']}" for row in result["rows"] if _is_quoted(row)]:
        lines.append(f"Not ours and not the paper's: {'; '.join(quoted)}.")
    lines += [f"{row['name']} ({row['dataset']}): {row['reason']}." for row in result["rows"] if row["reason"]]
    lines += [f"Our runs: {text}." for text in result["conditions"]]
    lines += [f"Energy not metered: {'; '.join(reasons)}."] if reasons else []
    if result["unfinished"]:
        lines.append(f"Runs still to come: {result['unfinished']}; the same command continues with them.")
    return lines


def _is_quoted(row: Mapping[str, Any]) -> bool:
    return row["paper"] is not None and row["paper"]["source"] is not None


def print_result(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the rows of a result of :func:`fastgate.paper.results.collect` and what one should know about them."""
    console = console or Console()
    headings, lines = _write_rows(result)
    print_table(result["title"], *_stack(headings, lines), console)
    print_lines([f"- {remark}" for remark in _remarks(result)], console)


def _stack(headings: list[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The same with one column of words, which leaves room for numbers: a row's name, and below it whose they are."""
    words = headings.index("by") + 1
    stacked = []
    for line in lines:
        *name, by = line[:words]
        if name[-1]:
            stacked.append(["\n".join(textwrap.wrap(": ".join(name), _NAME_WIDTH)), *[""] * (len(headings) - words)])
        indented = textwrap.wrap(by, _NAME_WIDTH, initial_indent="  ", subsequent_indent="  ")
        stacked.append(["\n".join(indented), *line[words:]])
    return ["", *headings[words:]], stacked


def to_markdown(result: Mapping[str, Any], figure: Path | None = None) -> str:
    """The same as Markdown, with a link to the figure in the same folder."""
    headings, lines = _write_rows(result)
    table = [headings, ["---" if heading in _WORDS else "---:" for heading in headings], *lines]
    parts = [f"# {result['title']}", f"Ours: {result['ran']}.", "\n".join(f"| {' | '.join(line)} |" for line in table)]
    if figure is not None:
        parts.append(f"![{result['title']}]({figure.name})")
    parts.append("\n".join(f"- {remark}" for remark in _remarks(result)))
    return "\n\n".join(parts) + "\n"


def write_result(result: Mapping[str, Any], folder: Path) -> Path:
    """Write TARGET.json and TARGET.md, and TARGET.png once every run is there; returns the Markdown file."""
    figure = folder / f"{result['target']}.png"
    if not result["unfinished"]:
        draw_result(result, figure)
    write_atomically(folder / f"{result['target']}.json", json.dumps(result, indent=2) + "\n")
    page = folder / f"{result['target']}.md"
    write_atomically(page, to_markdown(result, None if result["unfinished"] else figure))
    return page
