"""The paper's rows next to ours, as plain values for JSON."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastgate import schedules
from fastgate.paper.baselines import NaivePoint
from fastgate.paper.targets import Plan, Row

FORMAT, VERSION = "fastgate-paper", 1

_AVERAGED = (
    *("accuracy", "live_accuracy", "open_ratio", "polarization", "flops", "macs", "parameters", "seconds", "joules"),
    *("drop", "flops_share", "flops_cut"),
)
# epochs of a gate map: the first ones, or those around the step of a rising lambda
_MAP_EPOCHS = 50


def collect(
    plan: Plan, measured: Mapping[str, Mapping[str, Any]], naive: list[NaivePoint] | None = None
) -> dict[str, Any]:
    """A table's result so far.

    Args:
        plan: the table.
        measured: what each finished run measured, or the `reason` why there is no such run.
        naive: points of the naive baselines.

    Returns:
        `rows`: each with `dataset`, `name`, `paper` and `ours` (None: nothing printed, or no run: it is `pending`,
        or there is a `reason`); `ran`, our runs in short; their `conditions`; `notes`; `unfinished`, the number of runs
        still to come; `naive`; and `maps` of gates over the epochs.
    """
    baselines = {row.dataset: measured.get(row.runs[0].name) for row in plan.rows if row.name == "baseline"}
    rows = [_describe(row, measured, baselines[row.dataset]) for row in plan.rows]
    finished = [run for run in measured.values() if "reason" not in run]
    result = {
        "format": FORMAT,
        "version": VERSION,
        "target": plan.target,
        "title": plan.title,
        "rows": rows,
        "notes": list(plan.notes),
        "ran": _summarize(finished),
        "conditions": list(dict.fromkeys(run["conditions"] for run in finished)),
        "unfinished": sum(run.name not in measured for run in plan.runs),
    }
    if naive is not None:
        result["naive"] = naive
    if plan.maps:
        result["maps"] = [_map(row, measured[row.runs[0].name]) for row in plan.rows if _has_map(row, measured)]
    return result


def _summarize(runs: list[Mapping[str, Any]]) -> str:
    """Networks before pruning, data sets and epochs, each once."""
    recipes = [run["recipe"] for run in runs if run["control"] is None]
    parts = ([recipe[name] for recipe in recipes] for name in ("network", "dataset", "epochs"))
    networks, datasets, epochs = (", ".join(dict.fromkeys(map(str, part))) for part in parts)
    return f"{networks} on {datasets}, {epochs} epochs"


def _describe(
    row: Row, measured: Mapping[str, Mapping[str, Any]], baseline: Mapping[str, Any] | None
) -> dict[str, Any]:
    finished = [measured[run.name] for run in row.runs if run.name in measured]
    reasons = [run["reason"] for run in finished if "reason" in run]
    pending = len(finished) < len(row.runs)
    done = bool(row.runs) and not pending and not reasons
    return {
        "dataset": row.dataset,
        "name": row.name,
        "paper": None if row.printed is None else {**asdict(row.printed), "spread": dict(row.printed.spread)},
        "ours": _average(finished, baseline) if done and baseline is not None else None,
        "pending": pending,
        "reason": reasons[0] if reasons else None,
        "runs": [run.name for run in row.runs],
    }


def _average(runs: list[Mapping[str, Any]], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the seeds of a row; `spread` is their standard deviation where there are several."""
    each = [{**run, **_against(run, baseline)} for run in runs]
    ours: dict[str, Any] = {"spread": {}}
    for name in _AVERAGED:
        values = [run[name] for run in each]
        if any(value is None for value in values):
            ours[name] = None
            continue
        ours[name] = statistics.fmean(values) if len(values) > 1 else values[0]
        if len(values) > 1:
            ours["spread"][name] = statistics.stdev(values)
    kept = {name: each[0][name] for name in ("unpruned", "network", "control", "energy", "recipe", "date")}
    open_range = each[0]["open_range"] if len(each) == 1 else None
    return {**ours, **kept, "open_range": open_range, "seeds": [run["recipe"]["seed"] for run in each]}


def _against(run: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float | None]:
    counted = run["flops"] is not None and baseline["flops"] is not None
    share = run["flops"] / baseline["flops"] if counted else None
    return {
        "drop": baseline["accuracy"] - run["accuracy"],
        "unpruned": baseline["accuracy"],
        "flops_share": share,
        "flops_cut": None if share is None else 100 * (1 - share),
    }


def _has_map(row: Row, measured: Mapping[str, Mapping[str, Any]]) -> bool:
    return bool(row.runs) and bool(measured.get(row.runs[0].name, {}).get("gates", [[]])[0])


def _map(row: Row, run: Mapping[str, Any]) -> dict[str, Any]:
    """Open ratio of every gate in the epochs that Figure 6 shows; `changes`: epochs before a change of lambda."""
    changes = [epoch for epoch, _ in schedules.parse(run["recipe"]["polarization"]).points[1:]]
    first = max(round(changes[0]) - _MAP_EPOCHS // 2, 0) if changes else 0
    return {
        "name": row.name,
        "first_epoch": first + 1,
        "changes": [epoch for epoch in changes if epoch < first + _MAP_EPOCHS],
        "open_ratios": run["gates"][first : first + _MAP_EPOCHS],
    }
