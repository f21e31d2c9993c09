"""Record the decisions of a training run's channel gates on real images: `python -m bench.record_gates RUN DATA`.

Writes `bench/gates.npz`: the decisions of the second block of each stage on the first 256 test images, packed eight to
a byte, and the conditions as JSON. The committed file comes from this run (two epochs, a few minutes each on one core),
without polarization, which makes the decisions of all samples agree:

    OMP_NUM_THREADS=1 fastgate train --preset cifar10-channel --network resnet20 --epochs 2 --batch-size 128 \
        --warmup-epochs 0.5 --open-until 0 --anneal-until 0.5 --settle-at none --lambda-polar 0 \
        --data-root DATA --output RUN
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgate.gates import named_gates
from fastgate.modes import eval_mode
from fastgate.training.data import load_dataset
from fastgate.training.networks import load_network

FILE = Path(__file__).with_name("gates.npz")
IMAGES = 256
STAGES = (1, 2, 3)


def read_gates(file: Path = FILE) -> tuple[dict[int, Tensor], dict[str, object]]:
    """(stage -> decisions bool `[256, C]`, conditions)."""
    with np.load(file) as content:
        gates = {stage: torch.from_numpy(np.unpackbits(content[f"stage{stage}"], axis=1) == 1) for stage in STAGES}
        return gates, json.loads(str(content["conditions"]))


def record_gates(run: Path, data_root: Path, file: Path = FILE) -> None:
    """Evaluate the gates of the run's checkpoint on test images and write the file.

    Raises:
        ValueError: the run's gates are not live channel gates.
    """
    model, recipe = load_network(run / "checkpoint.pt")
    gates = dict(named_gates(model))
    if recipe.gates.gating != "channel" or any(gate.frozen for gate in gates.values()):
        raise ValueError(
            f"{run}: expected a run of live channel gates, got gating {recipe.gates.gating!r} or frozen ones; "
            "train with --gating channel --settle-at none"
        )
    dataset = load_dataset(recipe.data.dataset, data_root)
    images, _ = next(iter(dataset.evaluation("test", IMAGES)))
    with torch.no_grad(), eval_mode(model):
        model(images)
    decisions = {stage: gates[f"layer{stage}.1.gate"].decisions.bool() for stage in STAGES}
    conditions = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "images": f"the first {len(images)} of the test set",
        "gates": "of the second block of each stage",
        "open": {stage: round(float(opened.float().mean()), 4) for stage, opened in decisions.items()},
        "varying_channels": {stage: int((opened.any(0) & ~opened.all(0)).sum()) for stage, opened in decisions.items()},
        "test_accuracy": json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["eval"]["accuracy"],
        **json.loads((run / "config.json").read_text()),
    }
    packed = {f"stage{stage}": np.packbits(opened.numpy(), axis=1) for stage, opened in decisions.items()}
    np.savez_compressed(file, conditions=json.dumps(conditions), **packed)


def main(arguments: list[str] | None = None) -> int:
    """Write the file and print its conditions."""
    parser = argparse.ArgumentParser(prog="python -m bench.record_gates", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("data_root", type=Path, help="folder with the CIFAR files")
    options = parser.parse_args(arguments)
    try:
        record_gates(options.run, options.data_root)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    conditions = read_gates()[1]
    print(f"wrote {FILE}: open {conditions['open']}, varying channels {conditions['varying_channels']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
