"""Several runs side by side: what they share, and their networks' results over the seeds."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgate.training.recipe import list_values
from fastgate.training.run_folder import SUMMARY, read_config

# columns of a summary that are compared, all of the last epoch or of the network that it left
MEASURES = (
    *("accuracy", "macs", "parameters", "latency_ms", "images_per_second", "joules_per_image"),
    *("macs_training", "seconds_training", "joules_training"),
)


def compare_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Results of finished runs, those that differ only by their seed taken together.

    Returns:
        `dataset`, and `groups`: each with its `recipe` (without the seed), what of it `differs` between the groups, its
        `seeds`, its `folders`, and its `networks`: name -> measure -> `values` by seed, `mean` and `spread` (standard
        deviation of the seeds; None for one seed). A measure is None where a run does not know it; `to_compact` is the
        accuracy less that of the compact network of the same run.

    Raises:
        ValueError: no run, a folder without a finished run of this version, runs of different data sets, or two of the
            same recipe and seed.
    """
    if not folders:
        raise ValueError("runs: expected at least one run folder, got none")
    groups: list[dict[str, Any]] = []
    for folder in folders:
        recipe, rows = list_values(read_config(folder)), _read_rows(folder)
        seed = recipe["seed"]
        shared = {name: value for name, value in recipe.items() if name != "seed"}
        group = next((group for group in groups if group["recipe"] == shared), None)
        if group is None:
            group = {"recipe": shared, "seeds": [], "folders": [], "rows": []}
            groups.append(group)
        if seed in group["seeds"]:
            other = group["folders"][group["seeds"].index(seed)]
            raise ValueError(f"{folder}: expected another recipe or seed than that of {other}, got seed {seed} again")
        group["seeds"].append(seed)
        group["folders"].append(str(folder))
        group["rows"].append(rows)
    datasets = list(dict.fromkeys(group["recipe"]["dataset"] for group in groups))
    if len(datasets) > 1:
        raise ValueError(f"runs: expected one data set, got {', '.join(datasets)}; compare them one by one")
    for group in groups:
        group["differs"] = {
            name: value
            for name, value in group["recipe"].items()
            if any(other["recipe"][name] != value for other in groups)
        }
        group["networks"] = _over_seeds(group.pop("rows"))
    return {"dataset": datasets[0], "groups": groups}


def _read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / SUMMARY
    if not file.is_file():
        raise ValueError(f"{folder}: expected a finished run with {SUMMARY}, found none; go on with --resume")
    rows = json.loads(file.read_text())["rows"]
    return {name: row for name, row in rows.items() if row["accuracy"] is not None}


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
