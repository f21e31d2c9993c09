"""The paper's figures with our runs, and for its tables a plot of both."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgate.files import write_atomically
from fastgate.reports.gate_maps import draw_gate_map

_OURS, _PAPER, _PLAIN, _OTHERS = "tab:blue", "black", "tab:orange", "dimgray"
_MARKERS = "ov<>sPXd"

_LABELS = {
    "accuracy": "top-1 accuracy, %",
    "drop": "points below unpruned",
    "open_ratio": "open gates, %",
    "polarization": "R_polar",
    "flops_share": "FLOPs, of unpruned",
    "flops_cut": "FLOPs saved, %",
}
# what a table prints, where that is not the drop, the open ratio and the FLOPs
_MEASURES = {"table3": ("drop", "flops_cut"), "table4": ("accuracy", "polarization", "open_ratio")}


def draw_result(result: Mapping[str, Any], path: Path) -> None:
    """Draw a finished result of :func:`fastgate.paper.results.collect` to an image; its suffix says the format."""
    if "maps" in result:
        draw_gate_map(result["maps"], _title(result), path)
        return
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    draw = {"figure4": _draw_naive, "figure5": _draw_literature}.get(result["target"], _draw_table)
    figure = Figure(layout="constrained")
    figure.suptitle(_title(result))
    draw(figure, result)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix.removeprefix("."), dpi=120))


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['title']}\nours: {result['ran']}"


def _kind(row: Mapping[str, Any]) -> str:
    if row["name"] == "baseline":
        return "baseline"
    control = None if row["ours"] is None else row["ours"]["control"]
    return "plain" if control == "equal-macs" else "pruned"


def _draw_table(figure: Any, result: Mapping[str, Any]) -> None:
    """A line per row of the table, the paper's value as a ring and ours as a dot."""
    rows = [row for row in result["rows"] if _kind(row) != "baseline"]
    figure.set_size_inches(10, 1.8 + 0.4 * len(rows))
    several = len({row["dataset"] for row in rows}) > 1
    names = [f"{row['dataset']}: {row['name']}" if several else row["name"] for row in rows]
    measures = _MEASURES.get(result["target"], ("drop", "open_ratio", "flops_share"))
    axes = figure.subplots(1, len(measures), sharey=True)
    for axis, measure in zip(axes, measures, strict=True):
        for y, row in enumerate(rows):
            paper, ours = _value(row, "paper", measure), _value(row, "ours", measure)
            if row["reason"] and axis is axes[0]:
                axis.text(0.5, y, "no such network", transform=axis.get_yaxis_transform(), ha="center", va="center")
            if isinstance(paper, list | tuple):
                axis.plot(paper, [y, y], "|-", color=_PAPER, markersize=9)
            elif paper is not None:
                axis.plot(paper, y, "o", color=_PAPER, markerfacecolor="none", markersize=9)
            if ours is not None and not (_kind(row) == "plain" and measure == "open_ratio"):
                axis.plot(ours, y, "o", color=_PLAIN if _kind(row) == "plain" else _OURS, markersize=5)
        axis.set_xlabel(_LABELS[measure])
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0].plot([], [], "o", color=_PAPER, markerfacecolor="none", markersize=9, label="paper")
    axes[0].plot([], [], "o", color=_OURS, markersize=5, label="ours")
    if any(_kind(row) == "plain" for row in rows):
        axes[0].plot([], [], "o", color=_PLAIN, markersize=5, label="plain ResNet of equal MACs, ours")
    _add_legend(figure, axes[0])


def _value(row: Mapping[str, Any], by: str, measure: str) -> Any:
    return None if row[by] is None else row[by][measure]


def _draw_naive(figure: Any, result: Mapping[str, Any]) -> None:
    """Accuracy over the pruning rate, and over the FLOPs saved."""
    left, right = _two_panels(figure)
    naive = {kind: [p for p in result["naive"] if p["kind"] == kind] for kind in ("dropout", "layers")}
    for axis, kind, at, name, color in (
        (left, "dropout", "pruned", "naive dropout", "tab:red"),
        (left, "layers", "pruned", "naive layer pruning", "tab:green"),
        (right, "layers", "flops_cut", "naive layer pruning", "tab:green"),
    ):
        x = [point[at] for point in naive[kind]]
        axis.plot(x, [point["accuracy"] for point in naive[kind]], "s--", color=color, label=name)
        bounds = ([point[side] for point in naive[kind]] for side in ("lowest", "highest"))
        axis.fill_between(x, *bounds, color=color, alpha=0.15, linewidth=0)
    _plot_ours(left, result, lambda row: 100 - row["open_ratio"], "accuracy")
    _plot_ours(right, result, lambda row: row["flops_cut"], "accuracy", plain=True)
    left.set(xlabel="pruning rate, %", ylabel=_LABELS["accuracy"])
    right.set(xlabel=_LABELS["flops_cut"], ylabel=_LABELS["accuracy"])
    _add_legend(figure, left, right)


def _draw_literature(figure: Any, result: Mapping[str, Any]) -> None:
    """Accuracy over the pruning rate, and the drop over the FLOPs saved together with the paper's Table 3."""
    left, right = _two_panels(figure)
    _plot_ours(left, result, lambda row: 100 - row["open_ratio"], "accuracy")
    _plot_ours(right, result, lambda row: row["flops_cut"], "drop", plain=True)
    printed = {row["name"]: row["paper"] for row in result["rows"] if row["paper"] is not None}
    others = [name for name, paper in printed.items() if paper["source"] is not None]
    for name, paper in printed.items():
        # markers, not labels: the methods lie too close together
        style = {"color": _PAPER, "marker": "*", "markersize": 11, "label": "the paper"}
        if name in others:
            style = {"color": _OTHERS, "marker": _MARKERS[others.index(name)], "label": f"{name} (quoted in Table 3)"}
        right.plot(paper["flops_cut"], paper["drop"], linestyle="none", **style)
    left.set(xlabel="pruning rate, %", ylabel=_LABELS["accuracy"])
    right.set(xlabel=_LABELS["flops_cut"], ylabel=_LABELS["drop"])
    _add_legend(figure, left, right)


def _two_panels(figure: Any) -> Any:
    figure.set_size_inches(10, 4.8)
    axes = figure.subplots(1, 2)
    for axis in axes:
        axis.grid(alpha=0.3)
    return axes


def _plot_ours(axis: Any, result: Mapping[str, Any], x: Any, measure: str, *, plain: bool = False) -> None:
    """Our pruned networks in the order of x, the unpruned one, and where it makes sense the plain one of equal MACs."""
    ours = {kind: [row["ours"] for row in result["rows"] if row["ours"] and _kind(row) == kind] for kind in _STYLES}
    for kind, (style, color, label) in _STYLES.items():
        if kind == "plain" and not plain:
            continue
        known = [row for row in ours[kind] if x(row) is not None]  # FLOPs that an earlier version did not record
        if points := sorted((x(row), row[measure]) for row in known):
            axis.plot(*zip(*points, strict=True), style, color=color, label=label)


_STYLES = {
    "pruned": ("o-", _OURS, "ours, by λ_act"),
    "baseline": ("D", _OURS, "ours, unpruned"),
    "plain": ("^", _PLAIN, "plain ResNet of equal MACs"),
}


def _add_legend(figure: Any, *axes: Any) -> None:
    """One legend for all panels, each name once."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small")
