"""The first table of a report: what each run's networks reach and cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastgate.energy.sums import add_known
from fastgate.reports.quantities import UNKNOWN, format_seconds, format_si, shorten
from fastgate.reports.runs import RunRecord, look_up
from fastgate.reports.targets import describe_target, share_reached
from fastgate.reports.timing import doubt_times
from fastgate.training.records import EnergySource, Row, Rows
from fastgate.training.spending import sum_joules

_NOT_METERED = "not metered"


@dataclass(frozen=True)
class Column:
    """A column of the overview.

    Attributes:
        title: its header.
        field: the entry of a summary's row.
        form: writes a value.
        shared: whether to add the share of the unpruned network's value.
        absent: what stands for a value that could not be measured; one that does not apply, or that the run's version
            did not record, is a dash.
        spread: the entry of its quartiles, if it is measured over rounds.
    """

    title: str
    field: str
    form: Callable[[float], str]
    shared: bool = True
    absent: str = UNKNOWN
    spread: str | None = None


class Cell(NamedTuple):
    """The text of a cell, and smaller remarks below it."""

    text: str
    notes: tuple[str, ...] = ()


def _joules(value: float) -> str:
    return format_si(value, "J")


COLUMNS = (
    Column("top-1", "accuracy", lambda share: f"{share:.2%}", shared=False, absent="untrained"),
    Column("open gates", "open_ratio", lambda share: f"{share:.1%}", shared=False),
    Column("MACs", "macs", format_si),
    Column("parameters", "parameters", format_si),
    Column("latency", "latency_ms", lambda ms: f"{ms:.2f} ms", spread="latency_ms_quartiles"),
    Column("images/s", "images_per_second", lambda rate: f"{rate:,.0f}", spread="images_per_second_quartiles"),
    Column("training time", "seconds_training", format_seconds),
    Column("training MACs", "macs_training", format_si),
    Column("training energy", "joules_training", _joules, absent=_NOT_METERED),
    Column("energy/image", "joules_per_image", _joules, absent=_NOT_METERED),
)


def collect_rows(run: RunRecord) -> Rows:
    """Network -> its row: those of the summary, or while there is none the last epoch of the run and its controls."""
    if run.summary is not None:
        return run.summary["rows"]
    own = "unpruned" if run.recipe.gating == "none" else "gated"
    return {name: _last_epoch(track) for name, track in {**run.controls, own: run}.items() if track.history}


def _last_epoch(run: RunRecord) -> Row:
    last = run.history[-1]
    return {
        "accuracy": look_up(last, "eval", "accuracy"),
        "open_ratio": look_up(last, "open_ratio"),
        "macs": look_up(last, "macs"),
        "seconds_training": add_known([look_up(line, "seconds", "train") for line in run.history]),
        "macs_training": look_up(last, "macs_training", "total"),
        "joules_training": sum_joules(run.history, "train"),
    }


def choose_columns(groups: Sequence[Rows]) -> list[Column]:
    """The columns for which a network has a value, and those of energy, which say that there is none."""
    known = {field for rows in groups for row in rows.values() for field, value in row.items() if value is not None}
    return [column for column in COLUMNS if column.field in known or column.absent == _NOT_METERED]


def write_cells(rows: Rows, columns: Sequence[Column]) -> dict[str, list[Cell]]:
    """Network -> a cell per column."""
    base = rows.get("unpruned", Row())
    return {
        name: [_write_cell(row, Row() if row is base else base, column) for column in columns]
        for name, row in rows.items()
    }


def _write_cell(row: Row, base: Row, column: Column) -> Cell:
    value, other = look_up(row, column.field), look_up(base, column.field)
    if value is None:
        return Cell(column.absent if column.field in row else UNKNOWN)
    notes = [f"{value / other:.0%}"] if column.shared and other else []
    if column.spread and (quartiles := look_up(row, column.spread)):
        low, high = map(column.form, quartiles)
        notes.append(f"{low.split()[0]}\N{EN DASH}{high}")
    return Cell(column.form(value), tuple(notes))


def compare_networks(rows: Rows) -> str:
    """The compact network against the unpruned one in a sentence; empty where one of them is missing."""
    small, base = rows.get("compact"), rows.get("unpruned")
    if small is None or base is None:
        return ""
    against = "" if base.get("accuracy") is None else f" against {base['accuracy']:.2%}"
    rate, base_rate = small.get("images_per_second"), base.get("images_per_second")
    faster = f" and classifies {rate / base_rate:.2f} times as many images per second" if rate and base_rate else ""
    return (
        f"The compact network has {small['macs'] / base['macs']:.1%} of the unpruned network's MACs{faster}, at "
        f"{small['accuracy']:.2%}{against} top-1 accuracy."
    )


def explain_target(run: RunRecord, rows: Rows) -> str:
    """What share of the cost was asked for and what was reached, as a sentence; empty without a target.

    A share of MACs that was reached is said by :func:`compare_networks`.
    """
    said = describe_target(run.recipe, share_reached(run.recipe, rows))
    if said and run.recipe.cost == "macs" and compare_networks(rows):
        said, _ = said.split(",")
    return f"{said[0].upper()}{said[1:]}." if said else ""


def doubt(run: RunRecord, rows: Rows) -> str:
    """Why the times in the rows should not be trusted, as a sentence; empty if there is no reason."""
    said = doubt_times(rows, (run.summary or {}).get("environment", {}))
    return f"{said[0].upper()}{said[1:]}." if said else ""


def explain_energy(runs: Sequence[RunRecord]) -> str:
    """Where the joules of the runs and their controls come from, or why there are none."""
    sources: dict[str, None] = {}
    remarks: dict[str, None] = {}  # each once
    metered: list[EnergySource | None] = []
    for track in [track for run in runs for track in (run, *run.controls.values())]:
        metered += [record.get("energy") for record in track.history]
        metered += [row.get("energy") for row in (track.summary["rows"].values() if track.summary else ())]
    for energy in filter(None, metered):
        if (source := energy["source"]) not in (None, "unavailable"):
            sources[source] = None
        remarks |= dict.fromkeys(energy["warnings"])
    if not metered:
        return "no epoch is finished"
    if not sources and not remarks:
        return "not recorded: the runs are of a version that did not meter it"
    if not sources:
        return f"joules were not metered: {'; '.join(shorten(remarks))}"
    return "; ".join([f"joules from {', '.join(sources)}", *shorten(remarks)])
