"""What the gates of a run did: their map over the epochs, and a table of how each ended."""

from typing import NamedTuple

import torch

from fastgate.pruning.costs import gate_costs
from fastgate.pruning.decisions import GateDecision
from fastgate.reports.quantities import UNKNOWN, format_si
from fastgate.reports.runs import RunRecord
from fastgate.training.networks import build_network
from fastgate.training.recipe import recipe_from_dict


class SortableCell(NamedTuple):
    """What a cell says and what its column is sorted by; an unknown value has no key and comes last."""

    text: str
    key: float | None


_UNKNOWN = SortableCell(UNKNOWN, None)


def trace_gates(run: RunRecord) -> dict[str, list[float]]:
    """Gate -> its open ratio in every epoch, in forward order; a decided gate's stays what it is."""
    names = run.history[-1].get("gates", ()) if run.history else ()
    return {name: [_mean(line["gates"][name]) for line in run.history] for name in names}


def list_gates(run: RunRecord) -> list[dict[str, SortableCell]]:
    """Column -> cell, for every gate in forward order."""
    costs = _count_costs(run)
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
        row["MACs"] = _UNKNOWN if name not in costs else SortableCell(format_si(costs[name]), costs[name])
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


def _count_costs(run: RunRecord) -> dict[str, int]:
    """MACs that each gate switches; nothing before the summary says how large the images are.

    Nor for a recipe of a version whose networks this one does not build.
    """
    if run.summary is None or "image_size" not in run.summary:
        return {}
    try:
        recipe = recipe_from_dict(run.config["recipe"])
    except ValueError:
        return {}
    with torch.random.fork_rng(devices=[]):  # building a network draws its weights
        network = build_network(recipe, run.summary["image_size"], num_classes=1)
    return {name: int(cost.sum()) for name, cost in gate_costs(network, run.summary["image_size"]).items()}
