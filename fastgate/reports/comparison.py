"""Several runs side by side: what they share, and their networks' results over the seeds."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from fastgate.reports.recipes import RecipeFacts, without_seed
from fastgate.reports.runs import look_up, read_run
from fastgate.reports.targets import share_reached
from fastgate.training.records import Rows
from fastgate.training.run_folder import SUMMARY

# columns of a summary that are compared, all of the last epoch or of the network that it left
MEASURES = (
    *("accuracy", "macs", "parameters", "latency_ms", "images_per_second", "joules_per_image"),
    *("macs_training", "seconds_training", "joules_training"),
)


class Measure(TypedDict):
    """A number of several seeds: each of them, their mean, their standard deviation (None for one seed)."""

    values: list[float]
    mean: float
    spread: float | None


class Group(TypedDict, total=False):
    """Runs that differ only in their seed; a measure that one of them did not record is None.

    `recipe` is without the seed, `differs` what of it is not the same in all groups, `share_reached` that of the cost
    that the target is a share of, `networks` name -> measure by name. The measure `to_compact` is the accuracy minus
    that of the compact network of the same run.
    """

    recipe: dict[str, Any]
    seeds: list[int | None]
    folders: list[str]
    differs: dict[str, Any]
    share_reached: Measure | None
    networks: dict[str, dict[str, Measure | None]]


class Comparison(TypedDict):
    """Runs on one data set."""

    dataset: str | None
    groups: list[Group]


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Results of finished runs, those that differ only in their seed taken together.

    Raises:
        ValueError: no run, a folder without a finished run, runs of different data sets, or two of the same recipe and
            seed.
    """
    if not folders:
        raise ValueError("runs: expected at least one run folder, got none")
    groups: list[Group] = []
    members: list[list[tuple[RecipeFacts, Rows]]] = []  # of each group
    for folder in folders:
        run = read_run(folder)
        if run.summary is None:
            raise ValueError(f"{folder}: expected a finished run with {SUMMARY}, found none; go on with --resume")
        seed, shared = run.recipe.seed, without_seed(run.recipe)
        index = next((index for index, group in enumerate(groups) if group["recipe"] == shared), len(groups))
        if index == len(groups):
            groups.append({"recipe": shared, "seeds": [], "folders": []})
            members.append([])
        group = groups[index]
        if seed in group["seeds"]:
            other = group["folders"][group["seeds"].index(seed)]
            raise ValueError(f"{folder}: expected another recipe or seed than that of {other}, got seed {seed} again")
        group["seeds"].append(seed)
        group["folders"].append(str(folder))
        members[index].append((run.recipe, run.summary["rows"]))
    datasets = list(dict.fromkeys(runs[0][0].dataset for runs in members))
    if len(datasets) > 1:
        raise ValueError(f"runs: expected one data set, got {', '.join(map(str, datasets))}; compare them one by one")
    for group, runs in zip(groups, members, strict=True):
        # a field that only some versions have differs where it is recorded
        group["differs"] = {
            name: value
            for name, value in group["recipe"].items()
            if any(name not in other["recipe"] or other["recipe"][name] != value for other in groups)
        }
        group["share_reached"] = _describe([share_reached(recipe, rows) for recipe, rows in runs])
        group["networks"] = _over_seeds(
            [{name: row for name, row in rows.items() if row.get("accuracy") is not None} for _, rows in runs]
        )
    return {"dataset": datasets[0], "groups": groups}


def _over_seeds(runs: Sequence[Rows]) -> dict[str, dict[str, Measure | None]]:
    """Name of each network that every run has -> its measures."""
    names = [name for name in runs[0] if all(name in rows for rows in runs)]
    networks = {}
    for name in names:
        measures = {measure: [look_up(rows, name, measure) for rows in runs] for measure in MEASURES}
        if "compact" in names:
            compact = [look_up(rows, "compact", "accuracy") for rows in runs]
            measures["to_compact"] = [own - other for own, other in zip(measures["accuracy"], compact, strict=True)]
        networks[name] = {measure: _describe(values) for measure, values in measures.items()}
    return networks


def _describe(values: list[Any]) -> Measure | None:
    if any(value is None for value in values):
        return None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"values": values, "mean": statistics.fmean(values), "spread": spread}
