"""The network of a run: built from its recipe, loaded from its checkpoint, evaluated."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastgate import processes
from fastgate.gates import named_gates
from fastgate.models.attachment import attach
from fastgate.models.resnet import resnet
from fastgate.modes import eval_mode
from fastgate.pruning.compaction import cut_frozen
from fastgate.pruning.decisions import GateDecision, freeze
from fastgate.training.checkpoint import load_checkpoint
from fastgate.training.recipe import Recipe, recipe_from_dict
from fastgate.training.zoo import Network, find_network
from fastgate.values import Forward, call, device_of, to_device_of


def find_plain(recipe: Recipe, in_channels: int, num_classes: int, *, weights: str | None = None) -> Network:
    """The plain network of a recipe, with the recipe's weights or others, and its metadata."""
    model = recipe.model
    if model.cifar_depth is None:
        return find_network(model.network, num_classes, weights=weights or model.weights, in_channels=in_channels)
    return find_network(
        model.network,
        num_classes,
        weights=weights or model.weights,
        in_channels=in_channels,
        options={"widths": model.stage_widths, "shortcut": model.shortcut},
    )


def is_found(recipe: Recipe) -> bool:
    """Whether gates are attached to an existing network; a CIFAR network without weights is built with its gates."""
    return recipe.model.cifar_depth is None or recipe.model.weights != "none"


def build_network(
    recipe: Recipe, image_size: Sequence[int], num_classes: int, *, model: nn.Module | None = None
) -> nn.Module:
    """The network of a recipe for images of `image_size` (C, H, W), with the recipe's gates.

    Args:
        recipe: of the run.
        image_size: (C, H, W).
        num_classes: of the data set.
        model: the plain network, if it already exists; it is gated in place.
    """
    channels, height, width = image_size
    gates = recipe.gates
    options: dict[str, Any] = {
        "hidden_features": gates.hidden_features,
        "estimator": gates.estimator,
        "window": gates.window,
        "init_logit": gates.init_logit,
        "temperature": gates.temperature,
    }
    if gates.gating == "channel":
        options["depth"] = gates.gate_depth
    depth = recipe.model.cifar_depth
    if model is not None or depth is None or is_found(recipe):
        if gates.gating == "channel" and gates.gate_input == "flatten":
            raise ValueError(
                "gate_input: expected pool, got flatten, which only CIFAR networks without weights take; use pool for "
                f"{recipe.model.network}"
            )
        plain = find_plain(recipe, channels, num_classes).model if model is None else model
        return plain if gates.gating == "none" else attach(plain, gates.gating, gates.position, **options)
    build = partial(
        resnet,
        depth,
        num_classes,
        in_channels=channels,
        widths=recipe.model.stage_widths,
        shortcut=recipe.model.shortcut,
    )
    if gates.gating == "none":
        return build()
    if gates.gating == "channel" and gates.gate_input == "flatten":
        options["spatial_size"] = (height, width)
    return build(gating=gates.gating, position=gates.position, **options)


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
    """The network in a run's checkpoint, on the CPU, and its recipe; gates removed during training are not in it.

    Args:
        checkpoint: the file.
        decisions: of all gates of the run; the remaining gates are frozen to them.

    Raises:
        ValueError: the file is not a checkpoint, is damaged, or its network cannot be built from its recipe.
    """
    state = load_checkpoint(checkpoint)
    try:
        recipe, size, classes = recipe_from_dict(state["recipe"]), state["image_size"], state["num_classes"]
        final = state["search"]["final"] if state["search"] is not None else {}
    except KeyError as error:
        raise ValueError(
            f"{checkpoint}: expected the checkpoint of a run of this version, got one without {error}"
        ) from error
    # its weights come from the checkpoint
    plain = find_plain(recipe, size[0], classes, weights="none").model if recipe.model.weights != "none" else None
    model = build_network(recipe, size, classes, model=plain)
    gates = dict(named_gates(model))
    if decisions is not None:
        freeze(copy.deepcopy(model), decisions)  # rejects decisions of another network
        if odd := [name for name, opened in final.items() if not torch.equal(decisions[name].open, opened.cpu())]:
            raise ValueError(
                f"decisions: expected the final ones of {checkpoint}, got others for {', '.join(odd[:4])}; use "
                "those of the same run"
            )
    for name, opened in final.items():
        gates[name].freeze(opened)
    if recipe.search.compact_training:
        model = cut_frozen(model)
    model.load_state_dict(state["model"])
    if decisions is not None:
        freeze(model, {name: decisions[name] for name, _ in named_gates(model)})
    return model, recipe


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    dtype: torch.dtype = torch.float32,
    *,
    num_classes: int | None = None,
    forward: Forward | None = None,
) -> dict[str, float]:
    """Accuracy and mean cross-entropy over batches of (inputs, labels), in eval mode; the mode is restored.

    If the batches are sharded over processes, all processes must evaluate at the same time.

    Args:
        model: returns scores `[N, classes]`.
        batches: moved to the model's device.
        dtype: of the forward pass.
        num_classes: of the data set, if known.
        forward: `(model, inputs) -> scores`, for networks with another calling convention.

    Raises:
        ValueError: network and data set differ in the number of classes, or there are no batches.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device_of(model))
    samples = 0
    with eval_mode(model):
        for batch in batches:
            x, y = to_device_of(model, batch)
            with torch.autocast(y.device.type, dtype, enabled=dtype is not torch.float32):
                scores = call(model, x, forward)
            if num_classes is not None and scores.shape[1] != num_classes:
                raise ValueError(
                    f"model: it has {scores.shape[1]} classes, but the data set has {num_classes}; use the data set it "
                    "was trained on"
                )
            sums[0] += (scores.argmax(1) == y).sum()
            sums[1] += F.cross_entropy(scores.float(), y, reduction="sum")
            samples += len(y)
    if getattr(batches, "shard", (0, 1))[1] > 1:
        sums = processes.all_sum(sums)
        samples = int(processes.all_sum(torch.tensor(samples)))
    if not samples:
        raise ValueError("batches: expected at least one, got none")
    correct, loss = (sums / samples).tolist()
    return {"accuracy": correct, "loss": loss}
