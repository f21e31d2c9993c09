"""The conditions under which runs were made: machine, versions, precision, command, recipe."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from fastgate.reports.quantities import UNKNOWN
from fastgate.reports.runs import RunRecord


class Line(NamedTuple):
    """One condition: a value per run, and whether the runs differ in it."""

    name: str
    values: list[str]
    differs: bool


def list_conditions(run: RunRecord) -> dict[str, str]:
    """Condition -> value, for one run."""
    summary = run.summary or {}
    environment = summary.get("environment") or run.config.get("environment") or {}
    gpus = environment.get("gpus")

    def say(name: str) -> str:
        return str(environment.get(name) or UNKNOWN)

    cuda = (environment["cuda"] or "none") if "cuda" in environment else UNKNOWN
    conditions = {
        "folder": str(run.folder),
        "command": run.config.get("command") or "not recorded",
        "finished": _date(summary["date"]) if "date" in summary else "not recorded" if summary else "not yet",
        "seed": UNKNOWN if run.recipe.seed is None else str(run.recipe.seed),
        "device": summary.get("device", "not recorded before the end"),
        "GPU": UNKNOWN if gpus is None else ", ".join(gpu["name"] for gpu in gpus) or "none",
        "CPU": f"{say('cpu')}, cores: {say('cpu_cores')}, threads used: {say('torch_threads')}",
        "precision": summary.get("precision") or run.recipe.precision or UNKNOWN,
        "versions": _list(environment.get("versions"), " "),
        "system": f"Python {say('python')}, CUDA {cuda}, {say('system')}",
        "variables": _list(environment.get("variables"), "="),
    }
    load = max((row.get("load_average") or 0 for row in summary.get("rows", {}).values()), default=0)
    if load:
        conditions["load average"] = f"{load:.2f} in the minute before times were measured, the run's own included"
    if "latency" in summary:
        conditions["latency and images/s"] = summary["latency"]
    if summary.get("max_abs_difference") is not None:
        conditions["compact against frozen network"] = f"largest difference {summary['max_abs_difference']:.3g}"
    return conditions


def list_recipe(run: RunRecord) -> dict[str, str]:
    """Field of the recipe -> value."""
    return {name: str(value) for name, value in run.recipe.fields.items()}


def align(runs: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The conditions of several runs side by side, in the order of their first appearance."""
    names = dict.fromkeys(name for run in runs for name in run)
    lines = [(name, [run.get(name, UNKNOWN) for run in runs]) for name in names]
    return [Line(name, values, len(set(values)) > 1) for name, values in lines]


def _list(items: Mapping[str, Any] | None, between: str) -> str:
    if items is None:
        return UNKNOWN
    return ", ".join(f"{name}{between}{value}" for name, value in items.items() if value) or "none"


def _date(text: str) -> str:
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
