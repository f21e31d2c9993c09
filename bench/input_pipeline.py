"""The share of an epoch spent on making batches: `python -m bench.input_pipeline --data-root DIR --output FILE`.

Measured in CPU time of this process, which other jobs on the machine affect less than wall-clock time; on one thread,
since waiting threads count as well. The steps are the trainer's on the ungated network, the cheapest of its depth.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe_machine
from fastgate.files import write_atomically
from fastgate.training.data import load_dataset
from fastgate.training.pipeline import Run, make_trainer
from fastgate.training.recipe import make_recipe

BATCHES, STEPS, ROUNDS = 40, 3, 5


def processor_seconds(call: Callable[[], Any]) -> float:
    """CPU time of a call, over all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(dataset: str, data_root: str | None, network: str, batch_size: int) -> dict[str, Any]:
    """Medians over rounds of interleaved batches and steps, and the share of batches in their sum."""
    data = load_dataset(dataset, data_root)
    recipe = make_recipe(dataset=dataset, network=network, gating="none", batch_size=batch_size, precision="fp32")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Run(recipe, Path(folder)), data)
    batches, step = trainer.train_loader, trainer.training_step
    count = min(BATCHES, len(batches))
    schedule = torch.tensor(step.schedule(0.01, epoch=0.0))
    batch = next(iter(batches))
    step(batch, schedule)
    rounds = []
    for epoch in range(ROUNDS):
        made = processor_seconds(lambda: deque(islice(batches.start_at(epoch), count), maxlen=0)) / count  # noqa: B023
        trained = processor_seconds(lambda: [step(batch, schedule) for _ in range(STEPS)]) / STEPS
        rounds.append((made, trained))
    made, trained = (statistics.median(values) for values in zip(*rounds, strict=True))
    return {
        "dataset": dataset,
        "network": network,
        "batch_size": batch_size,
        "batch_milliseconds": 1e3 * made,
        "step_milliseconds": 1e3 * trained,
        "share": made / (made + trained),
        "rounds_milliseconds": [[1e3 * seconds for seconds in both] for both in rounds],
    }


def main() -> None:
    """Read the command line, measure, print, and write the output file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default=None, help="folder with CIFAR-10; without it, only digits are measured")
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    datasets = ["digits"] if options.data_root is None else ["digits", "cifar10"]
    rows = [measure(name, options.data_root, options.network, options.batch_size) for name in datasets]
    for row in rows:
        print(
            f"{row['dataset']}: {row['batch_milliseconds']:.2f} ms per batch, {row['step_milliseconds']:.1f} ms per "
            f"step of {row['network']}, both of processor time: {row['share']:.2%} of an epoch"
        )
    if options.output is not None:
        content = {
            "rows": rows,
            "threads": options.threads,
            "batches": BATCHES,
            "steps": STEPS,
            "rounds": ROUNDS,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
        }
        write_atomically(options.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
