"""Run folders read back, finished or still in progress, of this version and of earlier ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from fastgate.pruning.decisions import Decisions
from fastgate.reports.recipes import RecipeFacts, read_recipe
from fastgate.training.records import Config, EpochRecord, Summary
from fastgate.training.run_folder import CONFIG, CONTROL_PREFIX, DECISIONS, read_history, read_json, read_summary


class Phase(NamedTuple):
    """Epochs, counted from 1, in which the gates of a run were "open" (held so), in "search", or "settled"."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class RunRecord:
    """What `fastgate train` left in a run folder.

    Attributes:
        folder: where it lies.
        recipe: what was trained.
        config: `config.json`; in a folder that kept only its summary, what the summary repeats of it.
        history: `metrics.jsonl`, a record per finished epoch.
        summary: `summary.json`; None while the run is in progress.
        decisions: of its gates; None before they are made, and for a plain network.
        controls: name -> the run in the subfolder `control-<name>`.
    """

    folder: Path
    recipe: RecipeFacts
    config: Config
    history: list[EpochRecord]
    summary: Summary | None
    decisions: Decisions | None
    controls: dict[str, "RunRecord"]

    @property
    def epochs(self) -> int:
        """Of the whole run; those done so far where its recipe does not say."""
        return self.recipe.epochs or len(self.history)

    @property
    def phases(self) -> list[Phase]:
        """Of its gates, as far as it got; none for a network without gates."""
        named = [(_name_phase(line, self.recipe, self.epochs), line["epoch"]) for line in self.history]
        groups = [(name, [epoch for _, epoch in part]) for name, part in groupby(named, key=lambda pair: pair[0])]
        return [Phase(name, epochs[0], epochs[-1]) for name, epochs in groups if name is not None]


def read_run(folder: Path) -> RunRecord:
    """What a run folder holds.

    Raises:
        ValueError: the folder holds no run, or a damaged one.
    """
    summary = read_summary(folder)
    config = _read_config(folder, summary)
    decisions = folder / DECISIONS
    controls = [path.parent for path in sorted(folder.glob(f"{CONTROL_PREFIX}*/{CONFIG}"))]
    return RunRecord(
        folder,
        read_recipe(config["recipe"]),
        config=config,
        history=read_history(folder),
        summary=summary,
        decisions=Decisions.from_json(decisions) if decisions.exists() else None,
        controls={control.name.removeprefix(CONTROL_PREFIX): read_run(control) for control in controls},
    )


def look_up(record: Mapping[str, Any], *path: str) -> Any:
    """The value at a path in a record; None where it is missing, as what a version did not write."""
    value: Any = record
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _name_phase(line: EpochRecord, recipe: RecipeFacts, epochs: int) -> str | None:
    """The phase of an epoch, by its line of metrics; None where there are no gates.

    Earlier versions did not write it: gates that are frozen there were held open in the first epochs, and
    decided after that.
    """
    if not line.get("gates"):
        return None
    if "phase" in line:
        return line["phase"]
    if not line["frozen"]:
        return "search"
    held_open = line["open_ratio"] == 1.0 and line["epoch"] <= round((recipe.open_until or 0.0) * epochs)
    return "open" if held_open else "settled"


def _read_config(folder: Path, summary: Summary | None) -> Config:
    file = folder / CONFIG
    config: Config
    if file.is_file():
        config = read_json(file)
    elif summary is not None:
        config = {"recipe": look_up(summary, "recipe"), "environment": look_up(summary, "environment")}
    else:
        raise ValueError(f"{folder}: expected a run folder with {CONFIG}, found none")
    if not isinstance(config.get("recipe"), dict):
        raise ValueError(f"{file}: expected the configuration of a run with its recipe, got none; the file is foreign")
    return config
