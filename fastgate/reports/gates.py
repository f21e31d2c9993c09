"""The gates of a run: their open ratios over the epochs, and a table of how each of them ended."""

from typing import NamedTuple

from fastgate.pruning.decisions import GateDecision
from fastgate.reports.quantities import UNKNOWN, format_si
from fastgate.reports.runs import RunRecord


class SortableCell(NamedTuple):
    """The text of a cell and the key that its column is sorted by; an unknown value has no key and comes last."""

    text: str
    key: float | None


_UNKNOWN = SortableCell(UNKNOWN, None)


def trace_gates(run: RunRecord) -> dict[str, list[float]]:
    """Gate -> its open ratio in every epoch, in forward order; that of a decided gate no longer changes."""
    names = run.history[-1].get("gates", ()) if run.history else ()
    return {name: [_mean(line["gates"][name]) for line in run.history] for name in names}


def list_gates(run: RunRecord) -> list[dict[str, SortableCell]]:
    """Column -> cell, for every gate in forward order; MACs only where the run's summary has them."""
    costs = (run.summary or {}).get("gate_macs", {})
    rows = []
    for index, (name, trace) in enumerate(trace_gates(run).items(), 1):
        decision = run.decisions.get(name) if run.decisions else None
        row = {"#": SortableCell(str(index), index), "gate": SortableCell(name.removesuffix(".gate"), index)}
        if run.recipe.gating in ("channel", "both"):
            channels = len(run.history[-1]["gates"][name])
            row["channels"] = SortableCell(str(channels), channels)
        row["open"] = SortableCell(f"{trace[-1]:.1%}", trace[-1])
        row["decision"] = _UNKNOWN if decision is None else _describe_decision(decision)
        row["unanimity"] = _UNKNOWN if decision is None else _describe_unanimity(decision)
        if costs:
            row["MACs"] = SortableCell(format_si(costs[name]), costs[name])
        rows.append(row)
    return rows


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _describe_decision(decision: GateDecision) -> SortableCell:
    opened, total = int(decision.open.sum()), decision.open.numel()
    if total == 1:
        return SortableCell("open" if opened else "closed", opened)
    return SortableCell(f"{opened} of {total} open", opened / total)


def _describe_unanimity(decision: GateDecision) -> SortableCell:
    lowest = float(decision.unanimity.min())
    return SortableCell(f"{lowest:.1%}", lowest)
