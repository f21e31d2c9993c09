"""Ratios from a result file, as a table and a picture: `python -m bench.report bench/results/<device>/<date>.json`.

A ratio above 1 means that fastgate is that many times faster than the other provider in the same run. Times are those
of a CUDA graph with a cold L2 if the file has them, otherwise the host's median.
"""

import argparse
import json
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

# gates of real runs, with one open fraction each: not part of the curves
_REAL = ("settled", "recorded")
# width of the tables in characters, and an A4 page without its margins, in inches
_COLUMNS, _PAGE = 100, (7.5, 10.5)
# a row's identity: everything but the provider
_KEYS = ("op", "kind", "case", "mode", "open_fraction")


def read_rows(path: Path) -> tuple[dict[tuple[Any, ...], dict[str, dict[str, Any]]], dict[str, Any]]:
    """(rows: identity -> provider -> its numbers with `us`, the file's description of the machine)."""
    content = json.loads(path.read_text())
    rows: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for benchmark in content["benchmarks"]:
        extra = benchmark["extra_info"]
        if "provider" in extra:
            us = extra.get("graph_cold_us", benchmark["stats"]["median"] * 1e6)
            rows[tuple(extra.get(key) for key in _KEYS)][extra["provider"]] = {**extra, "us": us}
    return dict(rows), content["machine_info"].get("fastgate", {})


def ratios(rows: dict[tuple[Any, ...], dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One record per identity measured for fastgate; `vs` maps the other providers to their ratio."""
    records = []
    for identity, by_provider in rows.items():
        name = "fastgate" if "fastgate" in by_provider else "auto"
        ours = by_provider.get(name)
        if ours is None:
            continue
        # providers that cannot skip were measured at one open fraction only, and those without a gate for one kind
        others: dict[str, Any] = {}
        for (op, kind, case, mode, fraction), candidates in rows.items():
            if (op, case, mode) != (identity[0], *identity[2:4]):
                continue
            for other, row in candidates.items():
                same_kind = kind in (identity[1], "none") or other == "pruned"
                same_fraction = fraction == identity[4] or other not in ("auto", "pruned")
                if other not in (name, "fastgate") and same_kind and same_fraction:
                    others[other] = row
        records.append(
            {
                **dict(zip(_KEYS, identity, strict=True)),
                "us": ours["us"],
                "share_of_copy": ours.get("share_of_copy"),
                "vs": {other: row["us"] / ours["us"] for other, row in others.items()},
            }
        )
    return records


def print_ratios(records: list[dict[str, Any]], console: Console) -> None:
    """A table per operation and shape."""
    if records:
        console.print("us: fastgate's time; of copy: bandwidth that it reaches, as a share of a large copy's;")
        console.print("the others: how many times longer they take", end="\n\n")
    for operation, case in dict.fromkeys((record["op"], record["case"]) for record in records):
        shown = [record for record in records if (record["op"], record["case"]) == (operation, case)]
        names = list(dict.fromkeys(name for record in shown for name in record["vs"]))
        shares = ["of copy"] * any(record["share_of_copy"] is not None for record in shown)
        table = Table(title=f"{operation}, {case}", title_justify="left")
        for column in ("gates", "open", "mode", "us", *shares, *names):
            table.add_column(column, justify="left" if column in ("gates", "mode") else "right")
        for record in shown:
            share, fraction = record["share_of_copy"], record["open_fraction"]
            table.add_row(
                record["kind"],
                "" if fraction is None else f"{fraction:.2f}",
                record["mode"],
                f"{record['us']:.1f}",
                *["" if share is None else f"{share:.0%}"] * len(shares),
                *(f"{record['vs'][name]:.2f}x" if name in record["vs"] else "" for name in names),
            )
        console.print(table)


def relative_times(rows: dict[tuple[Any, ...], dict[str, dict[str, Any]]]) -> dict[tuple[str, ...], dict[float, float]]:
    """(kind, case, mode, provider) -> open fraction -> time over the dense convolution's."""
    found: dict[tuple[str, ...], dict[float, float]] = defaultdict(dict)
    dense = {identity[1:4]: by["dense"]["us"] for identity, by in rows.items() if "dense" in by}
    for (op, kind, case, mode, fraction), by_provider in rows.items():
        for provider in ("fastgate", "auto"):
            there = provider in by_provider and (kind, case, mode) in dense
            if op == "gated_conv" and kind not in _REAL and there:
                found[kind, case, mode, provider][fraction] = by_provider[provider]["us"] / dense[kind, case, mode]
    return dict(found)


def break_even(times: dict[float, float]) -> float | None:
    """The largest open fraction at which skipping is no slower than dense; None if it always is."""
    points = sorted(times.items())
    if points[-1][1] <= 1:
        return points[-1][0]
    for (low, before), (high, after) in reversed(list(pairwise(points))):
        if before <= 1:
            return low + (1 - before) / (after - before) * (high - low)
    return None


def print_break_even(times: dict[tuple[str, ...], dict[float, float]], console: Console) -> None:
    """A table per shape."""
    console.print("time over the dense convolution's, by share of open gates", end="\n\n")
    for shape in dict.fromkeys(case for _, case, _, _ in times):
        shown = {key: values for key, values in times.items() if key[1] == shape}
        fractions = sorted({fraction for values in shown.values() for fraction in values})
        table = Table(title=f"gated_conv, {shape}", title_justify="left")
        for column in ("gates", "mode", "path", *(f"{f:g}" for f in fractions), "pays up to"):
            table.add_column(column, justify="left" if column in ("gates", "mode", "path") else "right")
        for (kind, _, mode, provider), values in shown.items():
            even = break_even(values)
            cells = (f"{values[f]:.2f}" if f in values else "" for f in fractions)
            table.add_row(kind, mode, provider, *cells, "never" if even is None else f"{even:.2f}")
        console.print(table)


def draw_break_even(times: dict[tuple[str, ...], dict[float, float]], machine: str, path: Path) -> None:
    """A panel per kind of gate and mode, a line per shape; 1 = as slow as the dense convolution."""
    panels = list(dict.fromkeys((kind, mode) for kind, _, mode, _ in times))
    modes = list(dict.fromkeys(mode for _, mode in panels))
    kinds = list(dict.fromkeys(kind for kind, _ in panels))
    figure = Figure(figsize=(4 * len(modes), 3.4 * len(kinds) + 0.8), layout="constrained")
    axes = figure.subplots(len(kinds), len(modes), squeeze=False, sharex=True, sharey=True)
    cases = list(dict.fromkeys(case for _, case, _, _ in times))
    for (kind, case, mode, provider), values in times.items():
        axis = axes[kinds.index(kind), modes.index(mode)]
        points = sorted(values.items())
        style = "-" if provider == "fastgate" else "--"
        axis.plot(
            *zip(*points, strict=True), style, marker=".", color=f"C{cases.index(case)}", label=f"{case} {provider}"
        )
        axis.set_title(f"{mode}, gates: {kind}", fontsize=10)
    for axis in axes.flat:
        axis.axhline(1, color="black", linewidth=1)
        axis.grid(alpha=0.3)
        axis.set_xlabel("open fraction")
    axes[0, 0].set_ylim(bottom=0)  # once all curves are drawn: the axes are shared
    axes[0, 0].legend(fontsize=6)
    for row in axes:
        row[0].set_ylabel("time over dense")
    figure.suptitle(f"gated convolution\n{machine}", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_ratios(records: list[dict[str, Any]], machine: str, path: Path) -> None:
    """A row of panels per operation, a panel per mode: a line per shape, a dot per provider, 1 = as fast as fastgate.

    As wide as a page, and at most as high: with more lines, they are closer together.
    """
    operations = list(dict.fromkeys(record["op"] for record in records))
    modes = {op: list(dict.fromkeys(r["mode"] for r in records if r["op"] == op)) for op in operations}
    labels = {op: list(dict.fromkeys(_label(r) for r in records if r["op"] == op)) for op in operations}
    lines = [len(labels[operation]) for operation in operations]
    height = min(_PAGE[1], 0.9 + 0.9 * len(operations) + 0.17 * sum(lines))
    size = max(3.5, min(7.0, 60 * (height - 0.9 - 0.9 * len(operations)) / sum(lines)))  # font size in points
    figure = Figure(figsize=(_PAGE[0], height), layout="constrained")
    parts = figure.subfigures(len(operations), 1, squeeze=False, height_ratios=[4 + n for n in lines])[:, 0]
    colors = {
        "eager": "tab:blue",
        "dense": "tab:blue",
        "compile": "tab:orange",
        "ungated": "tab:gray",
        "pruned": "tab:green",
        "auto": "tab:purple",
    }
    for part, operation in zip(parts, operations, strict=True):
        axes = part.subplots(1, len(modes[operation]), squeeze=False, sharex=True, sharey=True)[0]
        for axis, mode in zip(axes, modes[operation], strict=True):
            shown = [record for record in records if (record["op"], record["mode"]) == (operation, mode)]
            for name, color in colors.items():
                points = [(r["vs"][name], labels[operation].index(_label(r))) for r in shown if name in r["vs"]]
                if points:
                    axis.scatter(*zip(*points, strict=True), color=color, label=name, zorder=3, s=2 * size)
            axis.axvline(1, color="black", linewidth=1)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
            axis.tick_params(axis="x", labelsize=7)
            axis.grid(alpha=0.3)
            axis.set_title(f"{operation}, {mode}", fontsize=8, loc="left")
        axes[0].set_yticks(range(len(labels[operation])), labels[operation], fontsize=size)
        axes[0].invert_yaxis()
        handles = {
            name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        part.legend(handles.values(), handles, fontsize=7, loc="outside lower right", ncols=len(handles))
    figure.suptitle(f"time of the others over fastgate's (right of 1: fastgate is faster)\n{machine}", fontsize=8)
    figure.savefig(path, dpi=150)


def _label(record: dict[str, Any]) -> str:
    opened = "" if record["open_fraction"] is None else f" {record['open_fraction']:.2f} open"
    return f"{record['case']} {record['kind']}{opened}"


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and write the picture next to the file, or where `--picture` says."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--picture", type=Path, help="PNG to write; default: next to the file")
    options = parser.parse_args(arguments)
    try:
        rows, machine = read_rows(options.file)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        print(f"{options.file}: expected a file written by python -m bench.record, got {error!r}", file=sys.stderr)
        return 2
    console = Console(width=max(_COLUMNS, Console().width))
    records = ratios(rows)
    gpus = ", ".join(f"{gpu['name']}, driver {gpu.get('driver')}" for gpu in machine.get("gpus", []))
    versions = machine.get("versions", {})
    described = (
        f"{gpus or machine.get('cpu')}; torch {versions.get('torch')}, triton {versions.get('triton')}, "
        f"commit {machine.get('commit')}, {options.file.stem}"
    )
    print_ratios(records, console)
    console.print(described, highlight=False)
    for benchmark in json.loads(options.file.read_text())["benchmarks"]:
        if "ratio" in benchmark["extra_info"]:
            extra = benchmark["extra_info"]
            shown = ", ".join(f"{name} {value:.3f}" for name, value in extra["ratio"].items())
            console.print(f"{extra['op']} {extra['case']}, times the ungated one's: {shown}", highlight=False)
    picture = options.picture or options.file.with_suffix(".png")
    if records:
        draw_ratios(records, described, picture)
        console.print(f"wrote {picture}", highlight=False)
    times = relative_times(rows)
    if times:
        print_break_even(times, console)
        picture = picture.with_stem(f"{picture.stem}-break-even")
        draw_break_even(times, described, picture)
        console.print(f"wrote {picture}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
