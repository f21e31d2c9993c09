"""The network of a run: built from its recipe, loaded from its checkpoint, evaluated."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastgate import processes
from fastgate.gates import named_gates
from fastgate.models.resnet import resnet
from fastgate.modes import eval_mode
from fastgate.pruning.compaction import cut_frozen
from fastgate.pruning.decisions import GateDecision, freeze
from fastgate.training.checkpoint import load_checkpoint
from fastgate.training.data import Batches
from fastgate.training.presets import Recipe, recipe_from_dict


def build_network(recipe: Recipe, image_size: Sequence[int], num_classes: int) -> nn.Module:
    """The network of a recipe for images of `image_size` (C, H, W), gated as the recipe says."""
    channels, height, width = image_size
    build = partial(
        resnet, recipe.depth, num_classes, in_channels=channels, widths=recipe.stage_widths, shortcut=recipe.shortcut
    )
    if recipe.gating == "none":
        return build()
    options: dict[str, Any] = {
        "hidden_features": recipe.hidden_features,
        "estimator": recipe.estimator,
        "window": recipe.window,
        "init_logit": recipe.init_logit,
        "temperature": recipe.temperature,
    }
    if recipe.gating == "channel":
        options["depth"] = recipe.gate_depth
        if recipe.gate_input == "flatten":
            options["spatial_size"] = (height, width)
    return build(gating=recipe.gating, position=recipe.position, **options)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass: "auto" is fp32 on a CPU, fp16 below sm_80, else bf16."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision: fp16 training needs a GPU, got device {device}; use fp32 or bf16")
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def load_network(checkpoint: Path, decisions: Mapping[str, GateDecision] | None = None) -> tuple[nn.Module, Recipe]:
    """The network in a run's checkpoint, on the CPU, and its recipe; gates that left it during training are not in it.

    Args:
        checkpoint: the file.
        decisions: of all gates of the run, to freeze those that are still there with.
    """
    state = load_checkpoint(checkpoint)
    recipe = recipe_from_dict(state["recipe"])
    model = build_network(recipe, state["image_size"], state["num_classes"])
    gates = dict(named_gates(model))
    if decisions is not None:
        freeze(copy.deepcopy(model), decisions)  # refuses those of another network
    for name, opened in state["search"]["decided"].items():
        gates[name].freeze(opened)
    if recipe.compact_training:
        model = cut_frozen(model)
    model.load_state_dict(state["model"])
    if decisions is not None:
        freeze(model, {name: decisions[name] for name, _ in named_gates(model)})
    return model, recipe


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Accuracy and mean cross-entropy over the batches, in eval mode; the mode is restored.

    Of batches that are shared among processes all have to be evaluated at the same time.

    Raises:
        ValueError: the network has another number of classes than the data set.
    """
    device = batches.images.labels.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with eval_mode(model):
        for x, y in batches:
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                scores = model(x)
            if scores.shape[1] != batches.dataset.num_classes:
                raise ValueError(
                    f"model: it has {scores.shape[1]} classes, but {batches.dataset.name} has "
                    f"{batches.dataset.num_classes}; use the data set it was trained on"
                )
            sums[0] += (scores.argmax(1) == y).sum()
            sums[1] += F.cross_entropy(scores.float(), y, reduction="sum")
    if batches.shard[1] > 1:
        sums = processes.all_sum(sums)
    correct, loss = (sums / len(batches.images)).tolist()
    return {"accuracy": correct, "loss": loss}
