"""Under which conditions runs were made: machine, versions, precision, command, recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, NamedTuple

from fastgate.reports.runs import RunRecord


class Line(NamedTuple):
    """One condition: a value per run, and whether the runs differ in it."""

    name: str
    values: list[str]
    differs: bool


def list_conditions(run: RunRecord) -> dict[str, str]:
    """Condition -> value, for one run."""
    summary = run.summary or {}
    environment = summary.get("environment") or run.config["environment"]
    gpus = ", ".join(gpu["name"] for gpu in environment["gpus"])
    cpu = f"{environment['cpu']}, cores: {environment['cpu_cores']}, threads used: {environment['torch_threads']}"
    conditions = {
        "folder": str(run.folder),
        "command": run.config.get("command") or "not recorded",
        "finished": _date(summary["date"]) if summary else "not yet",
        "seed": str(run.recipe.seed),
        "device": summary.get("device", "not recorded before the end"),
        "GPU": gpus or "none",
        "CPU": cpu,
        "precision": summary.get("precision", run.recipe.precision),
        "versions": ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version),
        "system": f"Python {environment['python']}, CUDA {environment['cuda'] or 'none'}, {environment['system']}",
        "variables": ", ".join(f"{name}={value}" for name, value in environment["variables"].items()) or "none",
    }
    if "latency" in summary:
        conditions["latency and images/s"] = summary["latency"]
    if "max_abs_difference" in summary:
        conditions["compact against frozen network"] = f"largest difference {summary['max_abs_difference']:.3g}"
    return conditions


def list_recipe(run: RunRecord) -> dict[str, str]:
    """Field of the recipe -> value."""
    return {name: str(value) for name, value in asdict(run.recipe).items()}


def align(runs: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The conditions of several runs side by side, in the order of their first appearance."""
    names = dict.fromkeys(name for run in runs for name in run)
    lines = [(name, [run.get(name, "—") for run in runs]) for name in names]
    return [Line(name, values, len(set(values)) > 1) for name, values in lines]


def _date(text: str) -> str:
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
