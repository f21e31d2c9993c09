"""The trainer's step on a gated network and on the ungated one, in turns: ResNet-20 on a CPU, ResNet-110 on a GPU.

On a GPU the step is replayed from its CUDA graph. The aim on an H200: at most 4.0 ms, gated, bf16, batch 256.
"""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import CUDA
from bench.conftest import device_clock
from bench.timing import Call
from fastgate.training.data import Dataset, ImageSet
from fastgate.training.presets import Recipe
from fastgate.training.trainer import Trainer

BATCH = 256  # that of the CIFAR recipes
ROUNDS = 20
WARMUP = 5  # on a GPU three steps run and the fourth is captured


def training_step(depth: int, gating: str, device: torch.device, folder: Path) -> tuple[Trainer, Call]:
    """A trainer with live gates, and its step on one batch of random images."""
    images = ImageSet(torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (BATCH,)))
    split = images.to(device)
    data = Dataset("random", split, split, 10, (0.5,) * 3, (0.25,) * 3, pad=4, flip=True)
    trainer = Trainer(Recipe(network=f"resnet{depth}", gating=gating, batch_size=BATCH), data, folder)
    trainer.model.train()
    step = trainer.training_step
    schedule = torch.tensor(step.schedule(0.01, epoch=0.0), device=device)
    x, y = next(iter(trainer.train_batches))
    return trainer, lambda: step(x, y, schedule)


def test_training_step(benchmark: Any, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if CUDA:
        monkeypatch.setenv("FASTGATE_IMPL", "triton")
    depth = 110 if CUDA else 20
    made = {gating: training_step(depth, gating, device, tmp_path) for gating in ("none", "layer", "channel")}
    steps = {"ungated" if gating == "none" else gating: step for gating, (_, step) in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range((ROUNDS if benchmark.enabled else 1) + WARMUP):
        for name, step in steps.items():
            start = device_clock()
            step()
            if turn >= WARMUP:
                seconds[name].append(device_clock() - start)
    trainers = [trainer for trainer, _ in made.values()]
    assert all(trainer.training_step.captured == CUDA for trainer in trainers)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    benchmark.extra_info.update(
        op="training_step",
        case=f"resnet{depth}-batch{BATCH}-{str(trainers[0].dtype).removeprefix('torch.')}",
        milliseconds={k: 1e3 * v for k, v in medians.items()},
    )
    # within a round the machine is the same for all
    benchmark.extra_info["ratio"] = {
        name: statistics.median(a / b for a, b in zip(values, seconds["ungated"], strict=True))
        for name, values in seconds.items()
    }
    benchmark.pedantic(steps["layer"], rounds=3)
