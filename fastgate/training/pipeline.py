"""From a recipe to a compact network on disk: train, decide, compact, check, measure, save."""

import json
import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastgate import processes
from fastgate.env import describe_environment
from fastgate.files import write_atomically
from fastgate.gates import named_gates
from fastgate.models.hooks import copy_network
from fastgate.optim import parameter_groups
from fastgate.pruning.compaction import compact
from fastgate.pruning.config import Phase
from fastgate.pruning.costs import flops, macs
from fastgate.pruning.decisions import Decisions, freeze
from fastgate.pruning.energy import measure_inference
from fastgate.pruning.equality import check_equal
from fastgate.pruning.latency import latency_quartiles
from fastgate.pruning.search import GateSearch
from fastgate.pruning.storage import save
from fastgate.training import distributed
from fastgate.training.callbacks import (
    Callback,
    Checkpoints,
    KernelChoices,
    Metering,
    MetricsFile,
    Progress,
    TensorBoard,
)
from fastgate.training.controls import control_recipe, draw_decisions
from fastgate.training.data import Data, load_data
from fastgate.training.lock import locked
from fastgate.training.loggers import open_logger
from fastgate.training.matching import match_latency, match_macs
from fastgate.training.networks import build_network, evaluate, find_plain, is_found, resolve_precision
from fastgate.training.recipe import Recipe, change, recipe_to_dict
from fastgate.training.records import Preprocessing, Row, Summary
from fastgate.training.run_folder import (
    CONFIG,
    CONTROL_PREFIX,
    DECISIONS,
    NETWORK,
    SUMMARY,
    open_folder,
    write_config,
)
from fastgate.training.spending import sum_joules
from fastgate.training.trainer import Trainer

_EVALUATION_BATCH, _LATENCY_BATCH = 500, 256
# larger images go in smaller batches of as many pixels: a batch is in memory together with all its activations
_SIDE = 64


def _bounded(batch_size: int, data: Data) -> int:
    """A batch size that results do not depend on, reduced where the data set's images are large."""
    _, height, width = data.image_size
    return max(1, min(batch_size, batch_size * _SIDE**2 // (height * width)))


@dataclass(frozen=True)
class Run:
    """A run: its recipe, its folder, its data and its device.

    Attributes:
        control: which kind of control of another run this is; None for a run of its own.
        command: the command line that started it, for its `config.json`; None where there was none.
        logger: where its metrics go besides `metrics.jsonl`, see :data:`~fastgate.training.loggers.LOGGERS`.
        model: the network without gates, in place of the recipe's.
        count_flops: whether the summary's rows have FLOPs by fvcore's convention too, see :func:`fastgate.flops`.
    """

    recipe: Recipe
    folder: Path
    data_root: str | None = None
    download: bool = False
    device: str = "cpu"
    control: str | None = None
    command: str | None = None
    logger: str = "none"
    model: nn.Module | None = None
    count_flops: bool = False

    def load_data(self) -> Data:
        """The run's data set, on its device; own images normalised as the network's pretrained weights expect."""
        options = self.recipe.data
        wanted: dict[str, Any] = {}
        with distributed.first_of_node():
            if options.dataset.startswith("folder:"):
                image_size = options.image_size
                if self.recipe.model.weights == "default":
                    network = find_plain(self.recipe, 3, 2)
                    wanted |= {"mean": network.mean, "std": network.std}
                    image_size = image_size or network.image_size
                wanted |= {"image_size": image_size, "workers": options.workers}
            elif options.image_size is not None or options.workers is not None:
                wanted |= {"image_size": options.image_size, "workers": options.workers}
            return load_data(
                options.dataset,
                self.data_root,
                download=self.download,
                validation=options.validation,
                train_images=options.train_images,
                device=self.device,
                **wanted,
            )


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe, with the gate heads in a group of their own."""
    options = recipe.optimizer
    groups = parameter_groups(model, options.gate_weight_decay, gate_lr=options.gate_lr_factor * options.learning_rate)
    fused = True if next(model.parameters()).is_cuda else None
    if options.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, lr=options.learning_rate, weight_decay=options.weight_decay, fused=fused, capturable=bool(fused)
        )
    return torch.optim.SGD(
        groups,
        lr=options.learning_rate,
        momentum=options.momentum,
        nesterov=options.nesterov and options.momentum > 0,
        weight_decay=options.weight_decay,
        fused=fused,
    )


def make_trainer(run: Run, data: Data) -> Trainer:
    """A trainer for the run, at its beginning; nothing is written."""
    recipe, device = run.recipe, torch.device(run.device)
    dtype = resolve_precision(recipe.run.precision, device)
    shard = (processes.rank(), processes.count())
    # on two CPU cores channels_last is 1.4x faster than NCHW (AMD EPYC, torch 2.15, ResNet-20, batch 256)
    batches: dict[str, Any] = {"shard": shard, "channels_last": True}
    train_loader = data.training(recipe.run.batch_size, seed=recipe.run.seed, **batches)
    torch.manual_seed(recipe.run.seed)
    model, notes = _build(run, data)
    optimizer, search = build_optimizer(recipe, model), None
    if recipe.gates.gating != "none":
        config = recipe.search.on(device.type, dtype is not torch.float32)
        search = GateSearch(model, data.image_size, optimizer, epochs=recipe.run.epochs, config=config)
    split = "validation" if "validation" in data.splits else "test"
    batch_size = _bounded(_EVALUATION_BATCH, data)
    evaluation = data.evaluation(split, batch_size, **batches)

    def evaluate_split(network: nn.Module) -> dict[str, Any]:
        return {"split": split, **evaluate(network, evaluation, dtype, num_classes=data.num_classes)}

    sizes = {"train": recipe.run.batch_size // shard[1], "eval": evaluation.batch_size}
    kept = {
        "recipe": recipe_to_dict(recipe),
        "image_size": list(data.image_size),
        "num_classes": data.num_classes,
    }
    callbacks: list[Callback] = [
        Metering(),
        KernelChoices(run.folder, data.image_size, sizes),
        MetricsFile(run.folder),
        Checkpoints(run.folder, kept),
        Progress(_title(run), notes),
    ]
    logger = open_logger(run.logger, run.folder) if processes.is_main() else None
    if logger is not None:
        callbacks.insert(3, TensorBoard(logger))
    smoothing = recipe.optimizer.label_smoothing
    return Trainer(
        model,
        optimizer,
        train_loader,
        nn.CrossEntropyLoss(label_smoothing=smoothing),
        epochs=recipe.run.epochs,
        search=search,
        calibration=data.evaluation("train", batch_size, **batches),
        evaluate=evaluate_split,
        callbacks=callbacks,
        folder=run.folder,
        learning_rate=recipe.learning_rate_at,
        measures={"accuracy": lambda scores, y: (scores.argmax(1) == y).mean(dtype=torch.float32)},
        example_inputs=data.image_size,
        dtype=dtype,
        sync_batch_norms=recipe.run.sync_batch_norms,
        compile=recipe.run.compile,
    )


def _title(run: Run) -> str:
    gating = run.recipe.gates.gating
    return f"{run.recipe.model.network} {run.control or ('plain' if gating == 'none' else gating)}"


def start_trainer(run: Run, data: Data, *, resume: bool) -> Trainer:
    """A trainer for the run; of a new run the folder is made, once everything else about it has proved possible."""
    trainer = make_trainer(run, data)
    if resume:
        trainer.restore()
    elif processes.is_main():
        write_config(run.folder, run.recipe, control=run.control, command=run.command)
    return trainer


class Outcome(NamedTuple):
    """What a run results in: its summary, and the network in its `model.safetensors`."""

    summary: Summary
    network: nn.Module


def train(run: Run, *, resume: bool = False) -> Summary:
    """Train a run to its end, and its controls; returns the summary, see :func:`finish`."""
    return finish(run, resume=resume).summary


def finish(run: Run, data: Data | None = None, *, resume: bool = False) -> Outcome:
    """Train a run to its end, and the controls that its recipe asks for; the summary is written too.

    The summary (`summary.json`) has a row per network: "unpruned", "gated", "compact" and the other controls, with test
    accuracy of the last epoch, open ratio, MACs, parameters, latency and throughput, what training took, and the
    conditions they were measured under. The compact network is `model.safetensors`; controls lie in folders of their
    own inside the run's. A plain recipe (gating "none") has the first row only. The gated row is what training ends
    with; where every gate has left the network during training that is the compact network, and there is no gated row.

    Under torchrun all processes train, in a folder that all of them can read; the main one measures and writes.
    """
    by_name = [kind for kind in run.recipe.run.controls if kind.startswith("equal-")]
    if run.model is not None and by_name:
        raise ValueError(
            f"control: {by_name[0]} needs a network given by name, whose depth and widths can be chosen, got a network "
            "object; leave it out, or train a smaller network of your own in another run"
        )
    with locked(run.folder):
        return _finish(run, data, resume=resume)


def _finish(run: Run, data: Data | None, *, resume: bool) -> Outcome:
    run = replace(run, recipe=open_folder(run.folder, run.recipe, resume=resume))
    data = data or run.load_data()
    trainer = start_trainer(run, data, resume=resume)
    trainer.fit()
    search = trainer.search
    if search is None:
        _save_network(trainer.model, run, data)
        networks, trainers = {"unpruned": trainer.model}, {"unpruned": trainer}
        return Outcome(processes.from_main(lambda: _write_summary(run, data, networks, trainers, None)), trainer.model)

    decisions = search.decisions if search.phase is Phase.SETTLED else search.decide(trainer.calibration)
    if processes.is_main():
        decisions.to_json(run.folder / DECISIONS)
    small, difference = trainer.model, search.difference
    gated = dict(named_gates(trainer.model))
    if gated:
        frozen = freeze(copy_network(trainer.model), {name: decisions[name] for name in gated})
        small = compact(frozen)
        x, _ = next(iter(data.evaluation("test", _bounded(_EVALUATION_BATCH, data), channels_last=True)))
        difference = max(difference, check_equal(frozen, small, x))
    _save_network(small, run, data)

    controls = {
        kind: train_control(kind, run, data, decisions, small, trainer, resume=resume)
        for kind in run.recipe.run.controls
    }
    trainers = {"gated" if gated else "compact": trainer, **controls}
    networks = {kind: control.model for kind, control in controls.items()}
    if "unpruned" not in networks:
        plain = change(run.recipe, gating="none", control="none")
        networks["unpruned"], _ = _build(replace(run, recipe=plain), data)  # only to be timed
    own = {**({"gated": trainer.model} if gated else {}), "compact": small}
    networks = {"unpruned": networks.pop("unpruned"), **own, **networks}
    summary = processes.from_main(
        lambda: _write_summary(run, data, networks, trainers, decisions, difference=difference)
    )
    return Outcome(summary, small)


def _build(run: Run, data: Data) -> tuple[nn.Module, tuple[str, ...]]:
    """The run's network, and notes on it for the user."""
    plain: nn.Module | None = run.model
    notes: tuple[str, ...] = ()
    if plain is not None:
        plain = copy_network(plain)
    elif is_found(run.recipe):
        found = find_plain(run.recipe, data.image_size[0], data.num_classes)
        plain, notes = found.model, found.notes
    model = build_network(run.recipe, data.image_size, data.num_classes, model=plain)
    return model.to(run.device).to(memory_format=torch.channels_last), notes


def train_control(
    kind: str, run: Run, data: Data, decisions: Decisions, compact: nn.Module, gated: Trainer, *, resume: bool
) -> Trainer:
    """Train a control of a run, see :data:`~fastgate.training.recipe.CONTROLS`, in a folder inside the run's.

    Args:
        kind: which control.
        run: the gated run.
        data: its data.
        decisions: what its search found.
        compact: its compact network.
        gated: its trainer, at the end.
        resume: continue the control that is in the folder, if there is one.
    """
    folder = run.folder / f"{CONTROL_PREFIX}{kind}"
    wanted = macs(compact, data.image_size)

    def find(name: str) -> str:
        if kind != "equal-latency":
            return match_macs(name, data.num_classes, data.image_size, wanted)
        x, _ = next(iter(data.evaluation("test", 1, channels_last=True)))
        # measured times differ from process to process
        return processes.from_main(lambda: match_latency(name, data.num_classes, x, compact))

    recipe = run.recipe
    resume = resume and processes.from_main((folder / CONFIG).exists)
    if not resume:  # a resumed control has its measured recipe in its folder
        spent = gated.macs_spent / (wanted * _images_trained(gated, run))
        recipe = control_recipe(kind, recipe, find, training=spent)
    control = replace(run, recipe=open_folder(folder, recipe, resume=resume), folder=folder, control=kind)
    trainer = start_trainer(control, data, resume=resume)
    search = trainer.search
    if search is not None and search.phase is not Phase.SETTLED:
        if kind == "random":
            decisions = draw_decisions(decisions, search.gate_macs, wanted, search.macs, recipe.run.seed)
        search.finalize(decisions)
    trainer.fit()
    return trainer


def _images_trained(trainer: Trainer, run: Run) -> int:
    return run.recipe.run.epochs * len(trainer.train_loader) * run.recipe.run.batch_size


def _save_network(network: nn.Module, run: Run, data: Data) -> None:
    if processes.is_main():
        written = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"recipe": recipe_to_dict(run.recipe), "data": describe_data(data)}
        metadata = {name: json.dumps(value) for name, value in about.items()}
        save(network, run.folder / NETWORK, metadata={**metadata, "written": written})


def describe_data(data: Data) -> Preprocessing:
    """What users of the network have to know about its images."""
    return {
        "dataset": data.name,
        "image_size": list(data.image_size),
        "mean": list(data.mean),
        "std": list(data.std),
        "class_names": None if data.class_names is None else list(data.class_names),
    }


def _write_summary(
    run: Run,
    data: Data,
    networks: dict[str, nn.Module],
    trainers: dict[str, Trainer],
    decisions: Decisions | None,
    *,
    difference: float | None = None,
) -> Summary:
    trainer = next(iter(trainers.values()))
    test = data.evaluation("test", _bounded(_EVALUATION_BATCH, data), channels_last=True)
    timed = data.evaluation("test", _bounded(_LATENCY_BATCH, data), channels_last=True)
    rows = measure_networks(networks, data, timed)
    for name, row in rows.items():
        if run.count_flops:
            row["flops"] = flops(networks[name], data.image_size)
        if name in ("gated", "compact") or name in trainers:
            row["accuracy"] = evaluate(networks[name], test, trainer.dtype, num_classes=data.num_classes)["accuracy"]
        if name == "compact" and decisions is not None:
            row["open_ratio"] = decisions.open_ratio
        if name in trainers:
            history = trainers[name].records
            row["open_ratio"] = history[-1]["open_ratio"]
            row["validation_accuracy"] = history[-1]["eval"]["accuracy"] if "validation" in data.splits else None
            row["macs_training"] = trainers[name].macs_spent
            row["seconds_training"] = sum(line["seconds"]["train"] for line in history)
            row["joules_training"], row["joules_evaluation"] = sum_joules(history, "train"), sum_joules(history, "eval")
    summary: Summary = {
        "rows": rows,
        "recipe": recipe_to_dict(run.recipe),
        "image_size": list(data.image_size),
        "preprocessing": describe_data(data),
        "images_trained": _images_trained(trainer, run),
        "device": run.device,
        "processes": processes.count(),
        "precision": str(trainer.dtype).removeprefix("torch."),
        "latency": f"median of interleaved passes, fp32, batch 1; throughput at batch {timed.batch_size}",
        "energy": trainer.records[-1].get("energy"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe_environment(),
    }
    if decisions is not None:
        summary["max_abs_difference"] = difference
        summary["polarization"] = decisions.polarization
        summary["lowest_unanimity"] = min(float(gate.unanimity.min()) for gate in decisions.values())
    if trainer.search is not None:
        summary["gate_macs"] = {name: int(cost.sum()) for name, cost in trainer.search.gate_macs.items()}
    write_atomically(run.folder / SUMMARY, json.dumps(summary, indent=2))
    return summary


def measure_networks(networks: dict[str, nn.Module], data: Data, batches: Any) -> dict[str, Row]:
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
            "macs": macs(model, data.image_size),
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
