"""Run folders read back, finished or still in progress."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgate.pruning.decisions import Decisions
from fastgate.training.pipeline import CONFIG, DECISIONS, SUMMARY, read_config
from fastgate.training.presets import Recipe


@dataclass(frozen=True)
class RunRecord:
    """What `fastgate train` left in a run folder.

    Attributes:
        folder: where it lies.
        recipe: what was trained.
        config: `config.json`.
        history: `metrics.jsonl`, a record per finished epoch.
        summary: `summary.json`; None while the run is in progress.
        decisions: of its gates; None before they were decided, and for a plain network.
        controls: name -> the run in the subfolder `control-<name>`.
    """

    folder: Path
    recipe: Recipe
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any] | None
    decisions: Decisions | None
    controls: dict[str, "RunRecord"]


def read_run(folder: Path) -> RunRecord:
    """What a run folder holds.

    Raises:
        ValueError: the folder holds no run, one of another version, or a damaged one.
    """
    recipe = read_config(folder)
    decisions = folder / DECISIONS
    controls = [path.parent for path in sorted(folder.glob(f"control-*/{CONFIG}"))]
    return RunRecord(
        folder,
        recipe,
        config=_read_json(folder / CONFIG),
        history=read_history(folder),
        summary=_read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else None,
        decisions=Decisions.from_json(decisions) if decisions.exists() else None,
        controls={control.name.removeprefix("control-"): read_run(control) for control in controls},
    )


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The record of every finished epoch of a run; none before the first is finished."""
    path = folder / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a JSON object per line, got {error}; the file is damaged") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}; the file is damaged") from error
    return content
