"""The folder of a run: the names of its files, and how they are written and read."""

import json
from pathlib import Path
from typing import Any

from fastgate import processes
from fastgate.env import describe_environment
from fastgate.files import write_atomically
from fastgate.training.recipe import Recipe, recipe_from_dict, recipe_to_dict
from fastgate.training.records import Config, EpochRecord, Summary

CONFIG, SUMMARY, METRICS = "config.json", "summary.json", "metrics.jsonl"
DECISIONS, CHOICES = "decisions.json", "choices.json"
CHECKPOINT, NETWORK = "checkpoint.pt", "model.safetensors"
CONTROL_PREFIX = "control-"


def write_config(folder: Path, recipe: Recipe, *, control: str | None = None, command: str | None = None) -> None:
    """Create the folder of a new run, with its `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    content: Config = {
        "recipe": recipe_to_dict(recipe),
        "control": control,
        "command": command,
        "environment": describe_environment(),
    }
    write_atomically(folder / CONFIG, json.dumps(content, indent=2))


def read_config(folder: Path) -> Recipe:
    """The recipe of the run in a folder, of this version or an earlier one.

    Raises:
        ValueError: the folder holds no run, or a damaged one.
    """
    config = folder / CONFIG
    if not config.is_file():
        raise ValueError(f"{folder}: expected a run folder with {CONFIG}, found none")
    try:
        return recipe_from_dict(json.loads(config.read_text())["recipe"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config}: expected the configuration of a run, got {error}; the file is foreign") from error


def read_history(folder: Path) -> list[EpochRecord]:
    """The record of every finished epoch of a run; none before the first is finished.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / METRICS
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a JSON object per line, got {error}; the file is damaged") from error


def read_summary(folder: Path) -> Summary | None:
    """The summary of a finished run; None where there is none yet.

    Raises:
        ValueError: the file is damaged.
    """
    summary: Summary | None = read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else None
    return summary


def read_json(path: Path) -> Any:
    """The JSON object in a file.

    Raises:
        ValueError: it holds none.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}; the file is damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}; the file is foreign")
    return content


def open_folder(folder: Path, recipe: Recipe, *, resume: bool) -> Recipe:
    """The recipe in force: the one given, or for a resumed run the one in its folder.

    Raises:
        ValueError: a new run in a folder that holds one, or nothing to resume.
    """

    def find_recipe() -> Recipe:
        if resume:
            return read_config(folder)
        if (folder / CONFIG).exists():
            raise ValueError(
                f"{folder}: expected a new or empty folder, got one that holds a run; resume it with --resume, or "
                "choose another --output"
            )
        return recipe

    return processes.from_main(find_recipe)
