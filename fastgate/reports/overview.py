"""The first table of a report: what each run's networks reach and cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastgate.reports.quantities import format_seconds, format_si
from fastgate.reports.runs import RunRecord
from fastgate.training.spending import sum_joules

Rows = Mapping[str, Mapping[str, Any]]

_NOT_METERED = "not metered"


@dataclass(frozen=True)
class Column:
    """A column of the overview.

    Attributes:
        title: its header.
        field: the entry of a summary's row.
        form: writes a value.
        shared: whether to add the share of the unpruned network's value.
        absent: what stands for a value that could not be had; one that does not apply is a dash.
    """

    title: str
    field: str
    form: Callable[[float], str]
    shared: bool = True
    absent: str = "—"


class Cell(NamedTuple):
    """What a cell says, and a smaller remark beside it."""

    text: str
    note: str = ""


def _joules(value: float) -> str:
    return format_si(value, "J")


COLUMNS = (
    Column("top-1", "accuracy", lambda share: f"{share:.2%}", shared=False, absent="untrained"),
    Column("open gates", "open_ratio", lambda share: f"{share:.1%}", shared=False),
    Column("MACs", "macs", format_si),
    Column("parameters", "parameters", format_si),
    Column("latency", "latency_ms", lambda ms: f"{ms:.2f} ms"),
    Column("images/s", "images_per_second", lambda rate: f"{rate:,.0f}"),
    Column("training time", "seconds_training", format_seconds),
    Column("training MACs", "macs_training", format_si),
    Column("training energy", "joules_training", _joules, absent=_NOT_METERED),
    Column("energy/image", "joules_per_image", _joules, absent=_NOT_METERED),
)


def collect_rows(run: RunRecord) -> Rows:
    """Network -> its row: those of the summary, or while there is none the last epoch of the run and its controls."""
    if run.summary is not None:
        rows: Rows = run.summary["rows"]
        return rows
    own = "unpruned" if run.recipe.gating == "none" else "gated"
    return {name: _last_epoch(track) for name, track in {**run.controls, own: run}.items() if track.history}


def _last_epoch(run: RunRecord) -> dict[str, Any]:
    last = run.history[-1]
    return {
        "accuracy": last["eval"]["accuracy"],
        "open_ratio": last["open_ratio"],
        "macs": last["macs"],
        "seconds_training": sum(line["seconds"]["train"] for line in run.history),
        "macs_training": last["macs_training"]["total"],
        "joules_training": sum_joules(run.history, "train"),
    }


def choose_columns(groups: Sequence[Rows]) -> list[Column]:
    """The columns for which a network has a value, and those of energy, which say that there is none."""
    known = {field for rows in groups for row in rows.values() for field, value in row.items() if value is not None}
    return [column for column in COLUMNS if column.field in known or column.absent == _NOT_METERED]


def write_cells(rows: Rows, columns: Sequence[Column]) -> dict[str, list[Cell]]:
    """Network -> a cell per column."""
    base = rows.get("unpruned", {})
    return {
        name: [_write_cell(row, {} if row is base else base, column) for column in columns]
        for name, row in rows.items()
    }


def _write_cell(row: Mapping[str, Any], base: Mapping[str, Any], column: Column) -> Cell:
    value, other = row.get(column.field), base.get(column.field)
    if value is None:
        return Cell(column.absent if column.field in row else "—")
    return Cell(column.form(value), f"{value / other:.0%}" if column.shared and other else "")


def compare_networks(rows: Rows) -> str:
    """The compact network against the unpruned one in a sentence; empty where one of them is missing."""
    small, base = rows.get("compact"), rows.get("unpruned")
    if small is None or base is None:
        return ""
    against = "" if base["accuracy"] is None else f" against {base['accuracy']:.2%}"
    return (
        f"The compact network has {small['macs'] / base['macs']:.1%} of the unpruned network's MACs and classifies "
        f"{small['images_per_second'] / base['images_per_second']:.2f} times as many images per second, at "
        f"{small['accuracy']:.2%}{against} top-1 accuracy."
    )


def explain_energy(runs: Sequence[RunRecord]) -> str:
    """Where the joules of the runs and their controls come from, or why there are none."""
    sources: dict[str, None] = {}
    remarks: dict[str, None] = {}  # each once
    for track in [track for run in runs for track in (run, *run.controls.values())]:
        rows = track.summary["rows"].values() if track.summary else ()
        for energy in [record["energy"] for record in (*track.history, *rows)]:
            if energy["source"] != "unavailable":
                sources[energy["source"]] = None
            remarks |= dict.fromkeys(energy["warnings"])
    if not sources and not remarks:
        return "no epoch is finished"
    if not sources:
        return f"joules were not metered: {'; '.join(remarks)}"
    return "; ".join([f"joules from {', '.join(sources)}", *remarks])
