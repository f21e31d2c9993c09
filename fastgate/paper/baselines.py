"""The naive baselines of section 5.3: a trained network with random parameters, or random layers, set to zero."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import nn

from fastgate.files import write_atomically
from fastgate.gates import named_gates
from fastgate.models.attachment import attach
from fastgate.pruning.compaction import compact
from fastgate.pruning.costs import flops
from fastgate.training.data import Loader
from fastgate.training.networks import evaluate

SHARES = (0.2, 0.3, 0.5, 0.6, 0.8)
# a single draw says little: much depends on which layers go
DRAWS = 3


class NaivePoint(TypedDict):
    """A naive baseline at a share `pruned` (%): its accuracy (%, mean over the draws, lowest and highest) and FLOPs.

    `flops_cut` is in %, a mean too; None for dropout, which computes as much as before.
    """

    kind: Literal["dropout", "layers"]
    pruned: float
    accuracy: float
    lowest: float
    highest: float
    flops_cut: float | None


def drop_parameters(model: nn.Module, share: float, seed: int) -> nn.Module:
    """A copy with a share of all its parameters set to 0, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    dropped = copy.deepcopy(model)
    with torch.no_grad():
        sizes = [parameter.numel() for parameter in dropped.parameters()]
        order = torch.randperm(sum(sizes), generator=generator)
        kept = torch.ones(len(order), dtype=torch.bool)
        kept[order[: round(share * len(order))]] = False
        for parameter, mask in zip(dropped.parameters(), kept.split(sizes), strict=True):
            parameter.mul_(mask.view_as(parameter).to(parameter.device))
    return dropped


def drop_layers(model: nn.Module, share: float, seed: int) -> nn.Module:
    """A copy without the branches of a share of its residual layers, drawn at random: as if these were set to 0."""
    generator = torch.Generator().manual_seed(seed)
    gated = attach(copy.deepcopy(model), "layer")
    gates = [gate for _, gate in named_gates(gated)]
    # halves are rounded up: round() would take the even number
    closed = set(torch.randperm(len(gates), generator=generator)[: math.floor(share * len(gates) + 0.5)].tolist())
    for index, gate in enumerate(gates):
        gate.freeze(torch.tensor([index not in closed]))
    return compact(gated)


def measure_naive(
    model: nn.Module, batches: Loader, image_size: Sequence[int], dtype: torch.dtype, file: Path
) -> list[NaivePoint]:
    """Both naive baselines at every share of :data:`SHARES`; measured once, then read from `file`."""
    points: list[NaivePoint] = []
    if file.is_file():
        points = json.loads(file.read_text())
        return points
    whole = flops(model, image_size)
    drops: dict[Literal["dropout", "layers"], Callable[[nn.Module, float, int], nn.Module]]
    drops = {"dropout": drop_parameters, "layers": drop_layers}
    for kind, drop in drops.items():
        for share in SHARES:
            accuracies, cuts = [], []
            for seed in range(1, DRAWS + 1):
                dropped = drop(model, share, seed)
                accuracies.append(100 * evaluate(dropped, batches, dtype)["accuracy"])
                cuts.append(100 * (1 - flops(dropped, image_size) / whole))
            points.append(
                {
                    "kind": kind,
                    "pruned": 100 * share,
                    "accuracy": sum(accuracies) / DRAWS,
                    "lowest": min(accuracies),
                    "highest": max(accuracies),
                    "flops_cut": sum(cuts) / DRAWS if kind == "layers" else None,
                }
            )
    write_atomically(file, json.dumps(points, indent=2))
    return points
