"""What a finished run measured: the columns of the paper's tables, and the cost of its training."""

from pathlib import Path
from typing import Any

import torch

from fastgate.pruning.decisions import Decisions
from fastgate.training.recipe import list_values, recipe_from_dict
from fastgate.training.records import Row, Summary
from fastgate.training.run_folder import CONFIG, DECISIONS, read_history, read_json


def measure_run(folder: Path, summary: Summary) -> dict[str, Any]:
    """Measures of the run's final network, the compact one where there were gates; None where it has none.

    Shares are in %; `flops` (None for runs of versions that did not record them), `macs` and `parameters` are counts;
    `seconds` and `joules` those of training. `gates` is, per epoch, the open ratio of every gate.
    """
    rows, recipe = summary["rows"], list_values(recipe_from_dict(summary["recipe"]))
    gated = recipe["gating"] != "none"
    final = rows["compact" if gated else "unpruned"]
    trained = rows.get("gated", final)
    history = read_history(folder)
    return {
        "accuracy": _percent(final),
        "live_accuracy": _percent(rows.get("gated", Row())),
        "open_ratio": 100 * final["open_ratio"],
        "open_range": _open_range(folder / DECISIONS) if gated else None,
        "polarization": history[-1]["polarization"] if gated else None,
        "flops": final.get("flops"),
        "macs": final["macs"],
        "parameters": final["parameters"],
        "seconds": trained["seconds_training"],
        "joules": trained["joules_training"],
        "energy": summary["energy"],
        "network": recipe["network"] + ("" if recipe["widths"] == "16,32,64" else f" of {recipe['widths']} channels"),
        "control": read_json(folder / CONFIG)["control"],
        "recipe": recipe,
        "conditions": _conditions(summary),
        "date": summary["date"],
        "gates": [[_mean(gate) for gate in line["gates"].values()] for line in history],
    }


def _open_range(file: Path) -> tuple[float, float]:
    """Gates open for all of the training images, and for at least one, in %: the same where all are unanimous."""
    means = torch.cat([gate.mean for gate in Decisions.from_json(file).values()])
    return 100 * float((means == 1).double().mean()), 100 * float((means > 0).double().mean())


def _percent(row: Row) -> float | None:
    accuracy = row.get("accuracy")
    return None if accuracy is None else 100 * accuracy


def _mean(channels: list[float]) -> float:
    return round(sum(channels) / len(channels), 4)


def _conditions(summary: Summary) -> str:
    """The data, the recipe and the machine of a run, in words."""
    environment, recipe = summary["environment"], list_values(recipe_from_dict(summary["recipe"]))
    gpus = ", ".join(gpu["name"] for gpu in environment["gpus"])
    on_gpu = summary["device"].startswith("cuda")
    machine = gpus if on_gpu else f"{environment['cpu']} (threads: {environment['torch_threads']})"
    return (
        f"{recipe['dataset']}, {recipe['epochs']} epochs, batch {recipe['batch_size']}, {summary['precision']}, "
        f"{machine}, torch {environment['versions']['torch']}"
    )
