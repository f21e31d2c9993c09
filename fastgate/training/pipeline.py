"""From a recipe to a compact network on disk: train, decide, freeze, compact, check, measure, save."""

import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgate.env import describe_environment
from fastgate.files import write_atomically
from fastgate.pruning.compaction import compact
from fastgate.pruning.costs import macs
from fastgate.pruning.decisions import Decisions, freeze
from fastgate.pruning.energy import measure_inference
from fastgate.pruning.latency import latency_quartiles
from fastgate.pruning.storage import save
from fastgate.training import distributed
from fastgate.training.controls import control_recipe, draw_decisions
from fastgate.training.data import Dataset, load_dataset
from fastgate.training.equality import check_equal
from fastgate.training.loggers import open_logger
from fastgate.training.networks import build_network, evaluate
from fastgate.training.presets import Recipe, recipe_from_dict
from fastgate.training.spending import sum_joules
from fastgate.training.trainer import Trainer

CONFIG, SUMMARY, DECISIONS, NETWORK = "config.json", "summary.json", "decisions.json", "model.safetensors"
CONTROL_PREFIX = "control-"

_LATENCY_BATCH = 256


@dataclass(frozen=True)
class Run:
    """Where a run lies and what it works on.

    Attributes:
        control: what kind of control of another run this one is.
        command: the command line that started it, for its `config.json`; None where there was none.
        logger: where its metrics go beside `metrics.jsonl`, see :data:`~fastgate.training.loggers.LOGGERS`.
    """

    recipe: Recipe
    folder: Path
    data_root: str | None = None
    download: bool = False
    device: str = "cpu"
    control: str | None = None
    command: str | None = None
    logger: str = "none"

    def load_data(self) -> Dataset:
        """The run's data set, on its device."""
        recipe = self.recipe
        with distributed.first_of_node():
            return load_dataset(
                recipe.dataset, self.data_root, download=self.download, validation=recipe.validation, device=self.device
            )


def start_trainer(run: Run, dataset: Dataset, *, resume: bool) -> Trainer:
    """A trainer for the run; of a new run the folder is made, once everything else about it has proved possible."""
    title = None if run.control is None else f"{run.recipe.network} {run.control}"
    logger = open_logger(run.logger, run.folder) if distributed.is_main() else None
    trainer = Trainer(run.recipe, dataset, run.folder, resume=resume, title=title, logger=logger)
    if not resume and distributed.is_main():
        run.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "recipe": asdict(run.recipe),
            "control": run.control,
            "command": run.command,
            "environment": describe_environment(),
        }
        write_atomically(run.folder / CONFIG, json.dumps(content, indent=2))
    return trainer


def check_folder(run: Run, *, resume: bool) -> Run:
    """The run with the recipe in force: its own, or when resuming the one in its folder.

    Raises:
        ValueError: a new run in a folder that holds one, or nothing to resume.
    """

    def find_recipe() -> Recipe:
        if resume:
            for stale in run.folder.glob(".*.tmp"):  # what a kill in the middle of writing left behind
                stale.unlink()
            return read_config(run.folder)
        if (run.folder / CONFIG).exists():
            raise ValueError(
                f"{run.folder}: expected a new or empty folder, got one that holds a run; go on with --resume, or "
                "choose another --output"
            )
        return run.recipe

    return replace(run, recipe=distributed.from_main(find_recipe))


def read_config(folder: Path) -> Recipe:
    """The recipe of the run in a folder.

    Raises:
        ValueError: the folder holds no run, or one of another version.
    """
    config = folder / CONFIG
    if not config.is_file():
        raise ValueError(f"{folder}: expected a run folder with {CONFIG}, found none")
    try:
        return recipe_from_dict(json.loads(config.read_text())["recipe"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{config}: expected the configuration of a run of this version, got {error!r}") from error


def train(run: Run, *, resume: bool = False) -> dict[str, Any]:
    """Train a run to its end, and the controls that its recipe asks for; returns and writes the summary.

    The summary (`summary.json`) has a row per network: "unpruned", "gated", "compact" and the other controls, with test
    accuracy of the last epoch, open ratio, MACs, parameters, latency and throughput, what training took, and the
    conditions they were measured under. The compact network is `model.safetensors`; controls lie in folders of their
    own inside the run's. A plain recipe (gating "none") has the first row only. The gated row is what training ends
    with; where every gate has left the network during training that is the compact network, and there is no gated row.

    Under torchrun all processes train, in a folder that all of them can read; the main one measures and writes.
    """
    run = check_folder(run, resume=resume)
    dataset = run.load_data()
    trainer = start_trainer(run, dataset, resume=resume)
    trainer.fit()
    test = trainer.batches(dataset.test)
    if not trainer.search.gates:
        _save_network(trainer.model, run)
        return distributed.from_main(
            lambda: _write_summary(run, dataset, {"unpruned": trainer.model}, {"unpruned": trainer}, None)
        )

    gated = evaluate(trainer.model, test, trainer.dtype)
    decisions = _final_decisions(trainer, run.folder)
    small, difference = trainer.model, trainer.search.difference
    if trainer.search.live:
        freeze(trainer.model, {name: decisions[name] for name in trainer.search.live})
        small = compact(trainer.model)
        x, _ = next(iter(test))
        difference = max(difference, check_equal(trainer.model, small, x, run.recipe.gating))
    _save_network(small, run)

    controls = {
        kind: train_control(kind, run, dataset, decisions, macs(small, dataset.image_size), resume=resume)
        for kind in run.recipe.controls
    }
    trainers = {"gated" if trainer.search.live else "compact": trainer, **controls}
    networks = {kind: control.model for kind, control in controls.items()}
    if "unpruned" not in networks:
        plain = build_network(
            replace(run.recipe, gating="none", control="none"), dataset.image_size, dataset.num_classes
        )
        networks["unpruned"] = plain.to(run.device).to(memory_format=torch.channels_last)
    own = {**({"gated": trainer.model} if trainer.search.live else {}), "compact": small}
    networks = {"unpruned": networks.pop("unpruned"), **own, **networks}
    for gate in trainer.search.live.values():
        gate.unfreeze()  # the gated row is timed as it trained: with its heads
    return distributed.from_main(
        lambda: _write_summary(run, dataset, networks, trainers, decisions, gated=gated, difference=difference)
    )


def train_control(kind: str, run: Run, dataset: Dataset, decisions: Decisions, wanted: int, *, resume: bool) -> Trainer:
    """Train a control of a run, see :data:`~fastgate.training.presets.CONTROLS`, in a folder inside the run's.

    Args:
        kind: of control.
        run: the gated run.
        dataset: its data.
        decisions: what its search found.
        wanted: MACs of its compact network.
        resume: go on with what is in the folder, if anything is.
    """
    folder = run.folder / f"{CONTROL_PREFIX}{kind}"
    recipe = control_recipe(kind, run.recipe, dataset.image_size, dataset.num_classes, wanted)
    control = replace(run, recipe=recipe, folder=folder, control=kind)
    resume = resume and distributed.from_main((folder / CONFIG).exists)
    trainer = start_trainer(check_folder(control, resume=resume), dataset, resume=resume)
    if trainer.search.gates and not trainer.search.over:
        if kind == "random":
            decisions = draw_decisions(decisions, trainer.search.macs_of, wanted, trainer.search.macs, recipe.seed)
        if distributed.is_main():
            decisions.to_json(folder / DECISIONS)
        trainer.make_final({name: gate.open for name, gate in decisions.items()})
    trainer.fit()
    return trainer


def _final_decisions(trainer: Trainer, folder: Path) -> Decisions:
    """The decisions of the settle epoch if there was one, else those of the trained gates over the training images."""
    path = folder / DECISIONS
    stored = distributed.from_main(lambda: Decisions.from_json(path) if trainer.search.over and path.exists() else None)
    if stored is not None:
        return stored
    decisions = trainer.decide()
    if distributed.is_main():
        decisions.to_json(path)
    return decisions


def _save_network(network: nn.Module, run: Run) -> None:
    if distributed.is_main():
        written = datetime.now(UTC).isoformat(timespec="seconds")
        save(network, run.folder / NETWORK, metadata={"recipe": json.dumps(asdict(run.recipe)), "written": written})


def _write_summary(
    run: Run,
    dataset: Dataset,
    networks: dict[str, nn.Module],
    trainers: dict[str, Trainer],
    decisions: Decisions | None,
    *,
    gated: dict[str, float] | None = None,
    difference: float | None = None,
) -> dict[str, Any]:
    any_trainer = next(iter(trainers.values()))
    test = any_trainer.batches(dataset.test)
    rows = measure_networks(networks, dataset, any_trainer.batches(dataset.test, _LATENCY_BATCH))
    for name, row in rows.items():
        if name == "gated":
            row["accuracy"] = gated["accuracy"] if gated else None
        elif name == "compact" or name in trainers:
            row["accuracy"] = evaluate(networks[name], test, any_trainer.dtype)["accuracy"]
        if name in trainers:
            row["open_ratio"] = trainers[name].history[-1]["open_ratio"]
        elif name == "compact" and decisions is not None:
            row["open_ratio"] = decisions.open_ratio
        if name in trainers:
            history = trainers[name].history
            row["validation_accuracy"] = history[-1]["eval"]["accuracy"] if dataset.validation is not None else None
            row["macs_training"] = history[-1]["macs_training"]["total"]
            row["seconds_training"] = sum(line["seconds"]["train"] for line in history)
            row["joules_training"], row["joules_evaluation"] = sum_joules(history, "train"), sum_joules(history, "eval")
    summary: dict[str, Any] = {
        "rows": rows,
        "recipe": asdict(run.recipe),
        "image_size": list(dataset.image_size),
        "images_trained": run.recipe.epochs * len(any_trainer.train_batches) * run.recipe.batch_size,
        "device": run.device,
        "processes": distributed.count(),
        "precision": str(any_trainer.dtype).removeprefix("torch."),
        "latency": f"median of interleaved passes, fp32, batch 1; throughput at batch {_LATENCY_BATCH}",
        "energy": any_trainer.history[-1].get("energy"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe_environment(),
    }
    if decisions is not None:
        summary["max_abs_difference"] = difference
        summary["polarization"] = decisions.polarization
        summary["lowest_unanimity"] = min(float(gate.unanimity.min()) for gate in decisions.values())
    write_atomically(run.folder / SUMMARY, json.dumps(summary, indent=2))
    return summary


def measure_networks(networks: dict[str, nn.Module], dataset: Dataset, batches: Any) -> dict[str, dict[str, Any]]:
    """MACs, parameters, latency of one image, images per second and joules per image, on one batch of real images.

    Times are medians with their lower and upper quartile over the rounds; `load_average` is the machine's over the
    minute before they were measured, None where the system keeps none. Joules are None where they cannot be metered;
    "energy" in a network's row says why, or where they come from.
    """
    x, _ = next(iter(batches))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    one = latency_quartiles(networks, x[:1])
    many = latency_quartiles(networks, x, rounds=10)
    energy = measure_inference(networks, x)
    images = x.shape[0]
    return {
        name: {
            "accuracy": None,
            "open_ratio": 1.0,
            "macs": macs(model, dataset.image_size),
            "parameters": sum(p.numel() for p in model.parameters()),
            "latency_ms": one[name][1] * 1e3,
            "latency_ms_quartiles": [one[name][0] * 1e3, one[name][2] * 1e3],
            "images_per_second": images / many[name][1],
            "images_per_second_quartiles": [images / many[name][2], images / many[name][0]],
            "load_average": load,
            "joules_per_image": energy[name].joules_per_sample,
            "energy": {"source": energy[name].source, "warnings": list(energy[name].warnings)},
        }
        for name, model in networks.items()
    }
