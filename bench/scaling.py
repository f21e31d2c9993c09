"""Scaling of training over processes, and the cost of synchronising batch statistics.

    python -m bench.scaling --output scaling.json
    torchrun --nproc-per-node 2 -m bench.scaling --output scaling.json
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m bench.scaling --output ...

Steps of a gated network on random images: forward, gate losses, backward, SGD. Each run adds the results for its number
of processes to the file, whose runs must have the same options, and prints all of them. Three ways are interleaved, so
that machine drift affects all alike:

* shared: the batch is split over the processes, as in `fastgate train`;
* shared, own statistics: the same without synchronising batch statistics and gate means (gradients are averaged);
* a batch each: every process has a batch of the full size.

Seconds are medians over rounds; CPU seconds are summed over the processes, and more reliable if other jobs are running.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastgate as fg
from bench.machine import describe_machine
from fastgate import processes
from fastgate.cli import resolve_device
from fastgate.files import write_atomically
from fastgate.ops.synchronization import synchronized
from fastgate.training import distributed
from fastgate.training.networks import build_network, resolve_precision
from fastgate.training.recipe import Recipe, make_recipe

_IMAGE = (3, 32, 32)
_CLASSES = 10


def make_steps(recipe: Recipe, device: torch.device) -> dict[str, tuple[int, Callable[[], None]]]:
    """For each way to train: images per step over all processes, and a function that runs one step."""
    dtype = resolve_precision(recipe.run.precision, device)
    torch.manual_seed(recipe.run.seed)
    model = build_network(recipe, _IMAGE, _CLASSES).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    network, count = distributed.parallel(model), processes.count()

    def step(x: Tensor, y: Tensor, statistics_of: Callable[[], AbstractContextManager[None]]) -> None:
        with statistics_of():
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                scores = network(x)
            loss = F.cross_entropy(scores.float(), y) + fg.polarization(model) + fg.activation(model)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    whole = torch.randn(recipe.run.batch_size, *_IMAGE, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(_CLASSES, (recipe.run.batch_size,), device=device)
    part = recipe.run.batch_size // count
    model.train()
    return {
        "shared": (part * count, lambda: step(whole[:part], labels[:part], synchronized)),
        "shared, own statistics": (part * count, lambda: step(whole[:part], labels[:part], nullcontext)),
        "a batch each": (recipe.run.batch_size * count, lambda: step(whole, labels, synchronized)),
    }


def measure(recipe: Recipe, device: torch.device, steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Time the ways to train, interleaved; the first round is a warm-up."""
    ways = make_steps(recipe, device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (_, step) in ways.items():
            _finish(device)
            started, cpu_started = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step()
            cpu = torch.tensor(time.process_time() - cpu_started, dtype=torch.float64)
            _finish(device)
            if turn:
                seconds[name].append((time.perf_counter() - started) / steps)
                cpu_seconds[name].append(float(processes.all_sum(cpu)) / steps)
    return {
        name: {
            "images": images,
            "seconds": statistics.median(seconds[name]),
            "seconds_of_rounds": seconds[name],
            "cpu_seconds": statistics.median(cpu_seconds[name]),
            "images_per_second": images / statistics.median(seconds[name]),
        }
        for name, (images, _) in ways.items()
    }


def _finish(device: torch.device) -> None:
    """Wait for this device's work, then for the other processes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    processes.wait()


def print_table(runs: dict[str, dict[str, Any]]) -> None:
    """Print all runs of the file; "faster" is images per second relative to the fewest processes."""
    table = Table(title="one training step")
    for column in ("processes", "way", "images", "seconds", "CPU seconds", "images/s", "faster"):
        table.add_column(column, justify="left" if column == "way" else "right")
    order = sorted(runs, key=int)
    for count in order:
        for name, row in runs[count]["rows"].items():
            faster = row["images_per_second"] / runs[order[0]]["rows"][name]["images_per_second"]
            cells = [f"{row[key]:.4g}" for key in ("images", "seconds", "cpu_seconds")]
            table.add_row(count, name, *cells, f"{row['images_per_second']:,.0f}", f"{faster:.2f}x")
    Console().print(table)


def add_run(path: Path, options: dict[str, Any], processes: int, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Add a run to the file, replacing an earlier one with the same number of processes; returns all its runs.

    Raises:
        ValueError: the file's runs had other options.
    """
    content = json.loads(path.read_text()) if path.exists() else {"options": options, "runs": {}}
    if content["options"] != options:
        raise ValueError(f"{path}: expected runs of {options}, got {content['options']}; choose another --output")
    content["runs"][str(processes)] = run
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    runs: dict[str, dict[str, Any]] = content["runs"]
    return runs


def main() -> None:
    """Read the command line, measure, print, and write the output file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--gating", default="layer", choices=("layer", "channel"))
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=10, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--note", default="", help="a remark on the machine, kept with the run")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to add this run to")
    given = parser.parse_args()
    with distributed.joined():
        device = torch.device(resolve_device(given.device))
        if given.batch_size < processes.count():
            raise ValueError(f"--batch-size: expected at least one per process, got {given.batch_size}")
        recipe = make_recipe(
            network=given.network, gating=given.gating, batch_size=given.batch_size, precision=given.precision
        )
        load = os.getloadavg()
        rows = measure(recipe, device, given.steps, given.rounds)
        run = {
            "rows": rows,
            "device": device.type,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "note": given.note,
            "load_before_and_after": [load[0], os.getloadavg()[0]],
            "environment": describe_machine(),
        }
        if not processes.is_main():
            return
        kept = ("network", "gating", "batch_size", "precision", "steps", "rounds")
        options = {name: getattr(given, name) for name in kept}
        runs = {str(processes.count()): run}
        if given.output is not None:
            runs = add_run(given.output, options, processes.count(), run)
        print_table(runs)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, distributed.ProcessLost) as error:
        sys.exit(f"error: {error}")
