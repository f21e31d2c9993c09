"""Energy of one epoch of the unpruned, the gated and the compact network, compared.

`python -m bench.energy_per_epoch --dataset cifar10 --network resnet56 --output energy.json`

All three are trained for the same epochs with the same recipe, interleaved, so that machine drift affects all alike.
The gated network has live gates; the compact network is compacted with the requested fraction of open gates. One line
per network: joules and seconds per epoch of training and of evaluation, means over the epochs, and the unpruned
network's joules divided by its own.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import fastgate as fg
from fastgate.cli import resolve_device
from fastgate.energy import Energy, EnergyMeter
from fastgate.env import describe_environment
from fastgate.files import write_atomically
from fastgate.training.data import Batches, Dataset, load_dataset
from fastgate.training.networks import build_network, evaluate, resolve_precision
from fastgate.training.recipe import Recipe, change, make_recipe, recipe_to_dict


def build_networks(recipe: Recipe, data: Dataset, open_ratio: float) -> dict[str, nn.Module]:
    """The three networks, the gated one with live gates.

    The compact network keeps the fraction `open_ratio` of the blocks, or of each block's channels, spread evenly.
    """
    gated = build_network(recipe, data.image_size, data.num_classes)
    gates = [gate for _, gate in fg.named_gates(gated)]
    for i, gate in enumerate(gates):
        total, ranks = (len(gates), torch.tensor([i])) if gate.gates == 1 else (gate.gates, torch.arange(gate.gates))
        gate.freeze(ranks * 7 % total < round(open_ratio * total))
    compact = fg.compact(gated)
    for gate in gates:
        gate.unfreeze()
    return {
        "unpruned": build_network(change(recipe, gating="none"), data.image_size, data.num_classes),
        "gated": gated,
        "compact": compact,
    }


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, dtype: torch.dtype) -> None:
    """One epoch of plain training; gated networks with the losses that keep their gates live."""
    model.train()
    device = batches.images.labels.device
    gated = any(True for _ in fg.named_gates(model))
    for x, y in batches:
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            scores = model(x)
        loss = F.cross_entropy(scores.float(), y)
        if gated:
            loss = loss + fg.polarization(model) + fg.activation(model)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def measure(recipe: Recipe, data: Dataset, open_ratio: float) -> dict[str, dict[str, Any]]:
    """Train and evaluate the networks, interleaved; the first epoch of each is a warm-up."""
    device = data.train.labels.device
    dtype = resolve_precision(recipe.run.precision, device)
    batches = Batches(data, data.train, recipe.run.batch_size, augment=True, seed=recipe.run.seed, channels_last=True)
    test = Batches(data, data.test, 500, channels_last=True)
    networks = build_networks(recipe, data, open_ratio)
    optimizers = {}
    for name, model in networks.items():
        model.to(device).to(memory_format=torch.channels_last)
        optimizers[name] = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    meter = EnergyMeter(device)
    spent: dict[str, dict[str, list[Energy]]] = {name: {"train": [], "eval": []} for name in networks}
    for epoch in range(recipe.run.epochs + 1):
        for name, model in networks.items():
            with meter.window(f"{name} train", items=len(batches) * recipe.run.batch_size) as train:
                train_epoch(model, optimizers[name], batches.start_at(epoch), dtype)
            with meter.window(f"{name} eval", items=len(data.test)) as evaluation:
                evaluate(model, test, dtype)
            if epoch:
                spent[name]["train"].append(train.result)
                spent[name]["eval"].append(evaluation.result)
    return {
        name: {
            "macs": fg.macs(model, data.image_size),
            **{kind: [energy.to_dict() for energy in windows] for kind, windows in spent[name].items()},
        }
        for name, model in networks.items()
    }


def mean(windows: list[dict[str, Any]], key: str) -> float | None:
    """The mean over the epochs; None if one is unknown."""
    values = [window[key] for window in windows]
    return None if None in values else sum(values) / len(values)


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Print joules and seconds per epoch, and the source of the joules."""
    table = Table(title="per epoch")
    for column in ("network", "MACs", "train J", "train s", "eval J", "eval s", "unpruned / this"):
        table.add_column(column, justify="left" if column == "network" else "right")
    reference = mean(rows["unpruned"]["train"], "joules")
    for name, row in rows.items():
        joules = mean(row["train"], "joules")
        cells = [joules, mean(row["train"], "seconds"), mean(row["eval"], "joules"), mean(row["eval"], "seconds")]
        ratio = "unknown" if joules is None or reference is None else f"{reference / joules:.2f}"
        shown = ["unknown" if cell is None else f"{cell:.4g}" for cell in cells]
        table.add_row(name, f"{row['macs'] / 1e6:.2f} M", *shown, ratio)
    console = Console()
    console.print(table)
    windows = [window for row in rows.values() for kind in ("train", "eval") for window in row[kind]]
    said = dict.fromkeys([f"energy: {windows[0]['source']}", *(text for w in windows for text in w["warnings"])])
    for line in said:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Read the command line, measure, print, and write the output file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--gating", default="layer", choices=("layer", "channel"))
    parser.add_argument("--open-ratio", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the results of every epoch")
    options = parser.parse_args()
    if not 0 < options.open_ratio <= 1:
        parser.error(f"--open-ratio: expected a fraction above 0, at most 1, got {options.open_ratio}")
    recipe = make_recipe(
        dataset=options.dataset,
        network=options.network,
        gating=options.gating,
        epochs=options.epochs,
        batch_size=options.batch_size,
        precision=options.precision,
    )
    data = load_dataset(options.dataset, options.data_root, device=resolve_device(options.device))
    rows = measure(recipe, data, options.open_ratio)
    print_table(rows)
    if options.output is not None:
        content = {
            "rows": rows,
            "recipe": recipe_to_dict(recipe),
            "open_ratio": options.open_ratio,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": describe_environment(),
        }
        write_atomically(options.output, json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
