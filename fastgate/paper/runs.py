"""Run what a table needs: every run in a folder of its own, resumed or reused if it is already there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgate.paper.baselines import NaivePoint, measure_naive
from fastgate.paper.measures import measure_run
from fastgate.paper.recipes import PlannedRun
from fastgate.paper.results import collect
from fastgate.paper.targets import Plan
from fastgate.pruning.storage import load
from fastgate.training.controls import match_recipe
from fastgate.training.networks import resolve_precision
from fastgate.training.pipeline import Run, train
from fastgate.training.recipe import Recipe, change, list_values
from fastgate.training.run_folder import CONFIG, NETWORK, SUMMARY, read_config, read_summary

RUNS, NAIVE = "runs", "naive.json"
# the control is another network of the same recipe
_OWN_FIELDS = {"network", "widths", "gating"}


@dataclass(frozen=True)
class Place:
    """Where runs are kept, their data and their device; `command` is the command line that asked for them."""

    output: Path
    data_root: str | None = None
    download: bool = False
    device: str = "cpu"
    command: str | None = None

    def folder(self, planned: PlannedRun) -> Path:
        """A run's folder."""
        return self.output / RUNS / planned.name

    def run(self, planned: PlannedRun, recipe: Recipe) -> Run:
        """A planned run with the recipe in force."""
        control = None if planned.equal_to is None else "equal-macs"
        folder = self.folder(planned)
        return Run(recipe, folder, self.data_root, self.download, self.device, control, self.command, count_flops=True)


def reproduce(plan: Plan, place: Place) -> Iterator[dict[str, Any]]:
    """Run or resume what a table or figure needs; gives the result so far after each run, see :func:`collect`.

    Raises:
        ValueError: a folder holds a run of another recipe or of another version, or there are no data; nothing has been
            trained then.
    """
    _check(plan, place)
    for stale in place.output.glob(".*.tmp"):  # what a kill in the middle of writing left behind
        stale.unlink()
    measured: dict[str, dict[str, Any]] = {}
    for planned in plan.runs:
        measured[planned.name] = _finish(planned, place, measured)
        naive = None
        if plan.naive is not None and len(measured) == len(plan.runs):
            naive = _naive_points(plan.naive, place)
        yield collect(plan, measured, naive)


def _check(plan: Plan, place: Place) -> None:
    """Refuse before any training what would fail after hours of it."""
    if place.output.exists() and not place.output.is_dir():
        raise ValueError(f"output: expected a folder, got the file {place.output}")
    for planned in plan.runs:
        folder = place.folder(planned)
        if not (folder / CONFIG).exists():
            continue
        try:
            stored = read_config(folder)
        except ValueError as error:
            raise ValueError(
                f"{folder}: it holds a run of another version ({error}); choose another --output"
            ) from error
        ignored = _OWN_FIELDS if planned.equal_to else set()
        has, needed = list_values(stored), list_values(planned.recipe)
        if odd := [name for name in needed if has[name] != needed[name] and name not in ignored]:
            is_now = ", ".join(f"{name} {has[name]}, not {needed[name]}" for name in odd)
            raise ValueError(
                f"{folder}: expected the run this table needs, got one with {is_now}; choose another --output"
            )
    open_runs = [planned for planned in plan.runs if not (place.folder(planned) / SUMMARY).exists()]
    for planned in {planned.recipe.data.dataset: planned for planned in open_runs}.values():
        place.run(planned, planned.recipe).load_data()


def _finish(planned: PlannedRun, place: Place, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Train a run, or what is left of it; its measures, or the reason why there is no such run.

    A control follows the run that it is a control of, whose measures are in `measured`.
    """
    folder = place.folder(planned)
    summary = read_summary(folder)
    if summary is None:
        resume = (folder / CONFIG).exists()
        recipe = read_config(folder) if resume else planned.recipe
        if planned.equal_to is not None and not resume:
            dataset = place.run(planned, recipe).load_data()
            macs = measured[planned.equal_to.name]["macs"]
            try:
                recipe = match_recipe(change(recipe, gating="none"), dataset.image_size, dataset.num_classes, macs)
            except ValueError as error:
                return {"reason": str(error)}
        summary = train(place.run(planned, recipe), resume=resume)
    return measure_run(folder, summary)


def _naive_points(planned: PlannedRun, place: Place) -> list[NaivePoint]:
    run = place.run(planned, planned.recipe)
    dataset = run.load_data()
    model = load(run.folder / NETWORK).to(run.device).to(memory_format=torch.channels_last)
    batches = dataset.evaluation("test", 500, channels_last=True)
    dtype = resolve_precision(run.recipe.run.precision, torch.device(run.device))
    return measure_naive(model, batches, dataset.image_size, dtype, run.folder / NAIVE)
