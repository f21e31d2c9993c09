"""Several runs side by side: what they share, and their networks' results over the seeds."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgate.reports.recipes import without_seed
from fastgate.reports.runs import read_run
from fastgate.reports.targets import share_reached
from fastgate.training.run_folder import SUMMARY

# columns of a summary that are compared, all of the last epoch or of the network that it left
MEASURES = (
    *("accuracy", "macs", "parameters", "latency_ms", "images_per_second", "joules_per_image"),
    *("macs_training", "seconds_training", "joules_training"),
)


def compare_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Results of finished runs, those that differ only by their seed taken together.

    Returns:
        `dataset`, and `groups`: each with its `recipe` (without the seed; fields of sections are "section.field"), what
        of it `differs` between the groups, its `seeds`, its `folders`, the `share_reached` of the cost that its target
        is of, and its `networks`: name -> measure. A measure has `values` by seed, `mean` and `spread` (standard
        deviation of the seeds; None for one seed); it is None where a run does not know it. `to_compact` is the
        accuracy less that of the compact network of the same run.

    Raises:
        ValueError: no run, a folder without a finished run, runs of different data sets, or two of the same recipe and
            seed.
    """
    if not folders:
        raise ValueError("runs: expected at least one run folder, got none")
    groups: list[dict[str, Any]] = []
    for folder in folders:
        run = read_run(folder)
        if run.summary is None:
            raise ValueError(f"{folder}: expected a finished run with {SUMMARY}, found none; go on with --resume")
        seed, shared = run.recipe.seed, without_seed(run.recipe)
        group = next((group for group in groups if group["recipe"] == shared), None)
        if group is None:
            group = {"recipe": shared, "seeds": [], "folders": [], "runs": []}
            groups.append(group)
        if seed in group["seeds"]:
            other = group["folders"][group["seeds"].index(seed)]
            raise ValueError(f"{folder}: expected another recipe or seed than that of {other}, got seed {seed} again")
        group["seeds"].append(seed)
        group["folders"].append(str(folder))
        group["runs"].append(run)
    datasets = list(dict.fromkeys(group["runs"][0].recipe.dataset for group in groups))
    if len(datasets) > 1:
        raise ValueError(f"runs: expected one data set, got {', '.join(map(str, datasets))}; compare them one by one")
    for group in groups:
        # a field that only some versions have differs where it is recorded
        group["differs"] = {
            name: value
            for name, value in group["recipe"].items()
            if any(name not in other["recipe"] or other["recipe"][name] != value for other in groups)
        }
        runs = [(run.recipe, run.summary["rows"]) for run in group.pop("runs")]
        group["share_reached"] = _describe([share_reached(recipe, rows) for recipe, rows in runs])
        group["networks"] = _over_seeds(
            [{name: row for name, row in rows.items() if row.get("accuracy") is not None} for _, rows in runs]
        )
    return {"dataset": datasets[0], "groups": groups}


def _over_seeds(runs: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Name of each network that every run has -> its measures."""
    names = [name for name in runs[0] if all(name in rows for rows in runs)]
    networks = {}
    for name in names:
        measures = {measure: [rows[name].get(measure) for rows in runs] for measure in MEASURES}
        if "compact" in names:
            measures["to_compact"] = [rows[name]["accuracy"] - rows["compact"]["accuracy"] for rows in runs]
        networks[name] = {measure: _describe(values) for measure, values in measures.items()}
    return networks


def _describe(values: list[Any]) -> dict[str, Any] | None:
    if any(value is None for value in values):
        return None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"values": values, "mean": statistics.fmean(values), "spread": spread}
