"""The trainer's step on gated networks and the ungated one, interleaved: ResNet-20 on a CPU, ResNet-110 on a GPU.

On a GPU both replayed from its CUDA graph, as in training, and launched kernel by kernel; gated networks with the
implementations that `auto` chooses, and with PyTorch only. The target on an H200: at most 4.0 ms, captured, gated,
bf16, batch 256.
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
from fastgate.training.pipeline import Run, make_trainer
from fastgate.training.recipe import make_recipe
from fastgate.training.trainer import Trainer

BATCH = 256  # as in the CIFAR recipes
ROUNDS = 20
WARMUP = 5  # on a GPU three steps run and the fourth is captured


def training_step(
    depth: int, gating: str, impl: str, captured: bool, device: torch.device, folder: Path, patch: pytest.MonkeyPatch
) -> tuple[Trainer, Call]:
    """A trainer with live gates, and its step on one batch of random images."""
    images = ImageSet(torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (BATCH,)))
    split = images.to(device)
    data = Dataset("random", split, split, 10, (0.5,) * 3, (0.25,) * 3, pad=4, flip=True)
    recipe = make_recipe(network=f"resnet{depth}", gating=gating, batch_size=BATCH)
    trainer = make_trainer(Run(recipe, folder, device=str(device)), data)
    trainer.model.train()
    step = trainer.training_step
    if not captured:
        step.graphs = None
    schedule = torch.tensor(step.schedule(0.01, epoch=0.0), device=device)
    batch = next(iter(trainer.train_loader))

    def call() -> None:
        with patch.context() as context:
            context.setenv("FASTGATE_IMPL", impl)
            step(batch, schedule)

    return trainer, call


@pytest.mark.parametrize("captured", [True, False] if CUDA else [False])
def test_training_step(
    benchmark: Any, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    depth = 110 if CUDA else 20
    variants = [("none", "auto"), ("layer", "auto"), ("channel", "auto")]
    variants += [("layer", "torch"), ("channel", "torch")] if CUDA else []
    made = {
        "ungated" if gating == "none" else gating if impl == "auto" else f"{gating}, {impl}": training_step(
            depth, gating, impl, captured, device, tmp_path, monkeypatch
        )
        for gating, impl in variants
    }
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range((ROUNDS if benchmark.enabled else 1) + WARMUP):
        for name, (_, step) in made.items():
            start = device_clock()
            step()
            if turn >= WARMUP:
                seconds[name].append(device_clock() - start)
    trainers = [trainer for trainer, _ in made.values()]
    assert all(trainer.training_step.captured == captured for trainer in trainers)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    how = ("captured" if captured else "eager",) if CUDA else ()
    benchmark.extra_info.update(
        op="training_step",
        case="-".join([f"resnet{depth}-batch{BATCH}-{str(trainers[0].dtype).removeprefix('torch.')}", *how]),
        milliseconds={k: 1e3 * v for k, v in medians.items()},
    )
    # within a round the machine is the same for all
    benchmark.extra_info["ratio"] = {
        name: statistics.median(a / b for a, b in zip(values, seconds["ungated"], strict=True))
        for name, values in seconds.items()
    }
    benchmark.pedantic(made["layer"][1], rounds=3)
