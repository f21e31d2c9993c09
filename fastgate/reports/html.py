"""A report of runs as one HTML page that needs nothing else: no internet connection, no other file."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastgate.files import write_atomically
from fastgate.reports import conditions, curves, gates, overview
from fastgate.reports.charts import draw_gate_map, round_epochs
from fastgate.reports.curves import JOULES, LOSSES, QUANTITIES, Track
from fastgate.reports.loading import explain_loading
from fastgate.reports.quantities import UNKNOWN
from fastgate.reports.runs import RunRecord, read_run

_COLOURS = 8  # of curves, in the page's style sheet
_DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one run, or of several runs on one data set side by side.

    Args:
        folders: run folders, at least one; a run may still be in progress.
        output: the file to write; default `report.html` in the first folder.

    Returns:
        The file written.

    Raises:
        ValueError: a folder without a run, one named twice, or runs on different data sets.
    """
    runs = [read_run(folder) for folder in folders]
    if len({run.recipe.dataset for run in runs}) > 1:
        found = ", ".join(f"{run.folder} ({run.recipe.dataset})" for run in runs)
        raise ValueError(f"report: expected runs on one data set, got {found}; write one report per data set")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"report: expected different runs, got {', '.join(map(str, folders))}; name each once")
    path = output or folders[0] / "report.html"
    write_atomically(path, render_report(runs))
    return path


def render_report(runs: Sequence[RunRecord]) -> str:
    """The page as text."""
    names = [run.folder.resolve().name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run.folder) for run in runs]
    named = dict(zip(labels, runs, strict=True))
    tracks = _list_tracks(named)
    rows = {label: overview.collect_rows(run) for label, run in named.items()}
    columns = overview.choose_columns(list(rows.values()))
    traces = {label: trace for label, run in named.items() if (trace := gates.trace_gates(run))}
    environment = Environment(loader=PackageLoader("fastgate.reports", "."), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.jinja").render(
        title=_describe(runs[0]) if len(runs) == 1 else f"{len(runs)} runs on {_dataset(runs[0])}",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=[
            {
                "label": label,
                "description": _describe(run),
                "progress": "" if run.summary else f"{len(run.history)} of {run.epochs} epochs are done",
                "sentence": overview.compare_networks(rows[label]),
                "target": overview.explain_target(run, rows[label]),
                "doubt": overview.doubt(run, rows[label]),
                "loading": explain_loading(run),
                "rows": overview.write_cells(rows[label], columns),
            }
            for label, run in named.items()
        ],
        columns=columns,
        energy=overview.explain_energy(runs),
        tracks=tracks,
        charts=_draw_charts(tracks),
        losses={**{loss.title: curves.draw(loss, tracks) for loss in LOSSES}, **curves.draw_gate_losses(tracks)},
        joules=JOULES.title,
        gates=[_show_gates(label, named[label], trace) for label, trace in traces.items()],
        conditions=conditions.align([conditions.list_conditions(run) for run in runs]),
        recipe=conditions.align([conditions.list_recipe(run) for run in runs]),
    )


def _dataset(run: RunRecord) -> str:
    return _DATASETS.get(run.recipe.dataset or "", run.recipe.dataset or UNKNOWN)


def _describe(run: RunRecord) -> str:
    recipe = run.recipe
    gating = "no gates" if recipe.gating == "none" else f"{recipe.gating or UNKNOWN} gates"
    network = (recipe.network or UNKNOWN).replace("resnet", "ResNet-")
    return f"{network} on {_dataset(run)}, {gating}, {run.epochs} epochs"


def _list_tracks(named: Mapping[str, RunRecord]) -> list[Track]:
    """Every run, followed by its controls; each has a colour of its own, the controls are dashed."""
    tracks: list[Track] = []
    for label, run in named.items():
        own = {label: run} | {f"{label}, {name} control": control for name, control in run.controls.items()}
        for name, track in own.items():
            style = f"c{len(tracks) % _COLOURS}"
            is_control = track is not run
            tracks.append(Track(name, track, f"{style} dashed" if is_control else style, is_control))
    return tracks


def _draw_charts(tracks: Sequence[Track]) -> dict[str, str | None]:
    """Title -> chart: the accuracy as a whole and its last part, then the rest."""
    accuracy, *others = [(quantity.title, curves.draw(quantity, tracks)) for quantity in QUANTITIES]
    last = curves.draw_last_accuracy(tracks)
    return dict([accuracy, *([] if last is None else [last]), *others])


def _show_gates(label: str, run: RunRecord, trace: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    epochs = run.epochs
    return {
        "label": label,
        "names": [name.removesuffix(".gate") for name in trace],
        "map": draw_gate_map(list(trace.values()), epochs),
        "row_height": max(13, min(24, 600 // len(trace))),
        "ticks": {epoch: f"{(epoch - 0.5) / epochs:.2%}" for epoch in round_epochs(epochs)},
        "table": gates.list_gates(run),
    }
